"""The CLIP image encoder: images to projected, unnormalised embeddings."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from d2i.config import Precision
from d2i.encoders.pretrained import load_pretrained, run_padded, weights_hash

# OpenAI CLIP's preprocessing (`_transform` in its `clip/clip.py`).
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class ClipImage:
    """A frozen CLIP image tower with its projection (ViT-B/32: 512 numbers per image)."""

    def __init__(self, name: str, device: str = "cpu", precision: Precision = "fp32") -> None:
        from transformers import CLIPVisionModelWithProjection

        self.device, self._precision = device, precision
        self.module = load_pretrained(CLIPVisionModelWithProjection, name).to(device)
        self.image_size: int = self.module.config.image_size
        self.dim: int = self.module.config.projection_dim
        self.hash = weights_hash(self.module)
        self._mean = torch.tensor(_MEAN, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(_STD, device=device).view(1, 3, 1, 1)

    @torch.inference_mode()
    def encode(self, pixels: NDArray[np.uint8], batch_size: int) -> NDArray[np.float32]:
        """Embed square uint8 images (N, H, H, 3) as float32 (N, clip_dim), not normalised.

        Images are resized to the tower's input with BICUBIC, as CLIP's own preprocessing does.
        """
        resized = np.stack([self._resize(image) for image in pixels])
        return run_padded(self._embed, resized, batch_size, self.device, self._precision)

    def _resize(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        size = (self.image_size, self.image_size)
        if image.shape[:2] == size:
            return image
        return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))

    def _embed(self, pixels_nhwc: Tensor) -> Tensor:
        images = pixels_nhwc.permute(0, 3, 1, 2).float().div(255.0)  # (N, 3, H, W)
        embeddings: Tensor = self.module((images - self._mean) / self._std).image_embeds
        return embeddings
