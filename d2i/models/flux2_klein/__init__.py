"""FLUX.2 klein (Black Forest Labs, 2026): its base model, conditioned on Qwen3's states."""
