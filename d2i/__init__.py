"""Dialog to image: a conversation goes in, the picture that answers it comes out."""

__version__ = "0.1.0"
