"""U-ViT (Bao et al., 2023): a text-to-image transformer with long skips."""
