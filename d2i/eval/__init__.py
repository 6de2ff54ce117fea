"""Sampling a test split, scoring it, and drawing single pictures (`d2i eval`, `d2i sample`)."""
