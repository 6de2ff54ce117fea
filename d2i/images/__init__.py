"""Image files: their types, decoding within limits, and images by name in directories and tars."""
