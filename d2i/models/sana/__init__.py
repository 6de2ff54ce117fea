"""Sana (Xie et al., 2024): a linear transformer over latents of 32 times fewer pixels a side."""
