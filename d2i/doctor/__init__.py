"""Checks of `d2i doctor`: `machine` for this machine, `cluster` for each node of a Ray cluster."""
