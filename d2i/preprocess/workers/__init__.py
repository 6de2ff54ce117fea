"""The workers of a preparation, which fetch, encode and repair, and their messages."""
