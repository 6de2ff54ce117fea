"""Generates and scores images of a test split, or of a single dialog (`d2i eval`, `d2i sample`)."""
