"""Stable Diffusion XL (Podell et al., 2023): its UNet, given two encoders' text latents."""
