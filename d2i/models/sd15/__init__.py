"""Stable Diffusion 1.5 (Rombach et al., 2022): its UNet, conditioned on CLIP-L's text latents."""
