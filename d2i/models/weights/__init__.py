"""Weights files: what a file is, its conversion between layouts, and safe loading."""
