"""Qwen-Image (Wu et al., 2025): its training loss."""
