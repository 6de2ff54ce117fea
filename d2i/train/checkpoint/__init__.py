"""Checkpoints and the averages of the weights."""
