"""UniDiffuser (Bao et al., 2023): one transformer for images, CLIP embeddings and text."""
