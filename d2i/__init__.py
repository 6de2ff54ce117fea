"""Dialog to image: generate the image that answers a conversation."""

__version__ = "0.1.0"
