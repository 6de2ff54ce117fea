"""Stable Diffusion 3 (Esser et al., 2024): its training loss."""
