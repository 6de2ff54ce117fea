"""The frozen encoders: images to VAE latents and CLIP embeddings, token ids to text latents.

Every encoder runs at a fixed, padded batch size: an image's numbers do not depend on its batch.
"""

from d2i.encoders.bundle import Encoders, load_encoders
from d2i.encoders.clip_image import ClipImage
from d2i.encoders.clip_text import ClipText, load_clip_text
from d2i.encoders.vae import Vae

__all__ = [
    "ClipImage",
    "ClipText",
    "Encoders",
    "Vae",
    "load_clip_text",
    "load_encoders",
]
