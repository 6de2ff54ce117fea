"""Z-Image (Cai et al., 2025): a single-stream transformer, conditioned on Qwen3's states."""
