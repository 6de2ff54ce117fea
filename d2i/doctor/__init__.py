"""Checks of `d2i doctor`: `machine` here, `base_text` of a pipeline, `cluster` on each Ray node."""
