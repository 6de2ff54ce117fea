"""The demo's codec: a small `AutoencoderKL` that preserves what the judge reads.

Downsampling factor 4, so a 64x64 px image has latents of (4, 16, 16). The loss weights edges more,
as shapes are the first thing that a small codec loses.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from benchmarks.demo_weights.images import ImageBatch

_BATCH = 16
_KL_WEIGHT = 1e-6
_EDGE_WEIGHT = 4.0
# Noise on the latents, in units of their standard deviation: generated latents are never exact.
_LATENT_NOISE = 0.1


def build_codec() -> Any:
    """Build an untrained codec whose encoder starts out nearly noiseless."""
    codec: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        codec.quant_conv.weight[4:] = 0
        codec.quant_conv.bias[4:] = -8
    return codec


def train_codec(codec: Any, images: ImageBatch, num_steps: int, seed: int) -> None:
    """Train in place and set `scaling_factor` to one over the latents' standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    codec.train()
    optimizer = torch.optim.AdamW(codec.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: learning_rate(s, num_steps))
    for step in range(num_steps):
        indices = torch.randint(len(images.scenes), (_BATCH,), generator=generator)
        loss = codec_loss(codec, images.batch(indices), noisy=step > num_steps // 4)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"codec step {step} of {num_steps}: loss {loss.item():.5f}", flush=True)
    codec.eval()
    codec.register_to_config(scaling_factor=measure_latent_scale(codec, images))


def learning_rate(step: int, num_steps: int, warm_up: int = 50) -> float:
    """Return the factor of the peak rate: linear warm-up, then a half cosine to 0."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm_up) / (num_steps - warm_up))))


def codec_loss(codec: Any, pixels_BCHW: Tensor, *, noisy: bool) -> Tensor:
    """Return the edge-weighted absolute plus squared error, plus a small KL term."""
    posterior = codec.encode(pixels_BCHW).latent_dist
    latent_BCHW = posterior.sample()
    if noisy:
        spread = latent_BCHW.detach().std()
        latent_BCHW = latent_BCHW + _LATENT_NOISE * spread * torch.randn_like(latent_BCHW)
    error_BCHW = codec.decode(latent_BCHW).sample - pixels_BCHW
    weight_B1HW = 1 + _EDGE_WEIGHT * edges(pixels_BCHW)
    fit = (weight_B1HW * (error_BCHW.abs() + error_BCHW.square())).mean()
    loss: Tensor = fit + _KL_WEIGHT * posterior.kl().mean()
    return loss


def edges(pixels_BCHW: Tensor) -> Tensor:
    """Return each pixel's difference from its right and lower neighbour: (B, 1, H, W), 0..~2."""
    right = functional.pad(pixels_BCHW.diff(dim=3), (0, 1, 0, 0)).abs()
    lower = functional.pad(pixels_BCHW.diff(dim=2), (0, 0, 0, 1)).abs()
    return functional.max_pool2d((right + lower).mean(1, keepdim=True), 3, 1, 1)


@torch.no_grad()
def encode_means(codec: Any, images: ImageBatch, batch: int = 128) -> Tensor:
    """Return the unscaled latent means of all images: float32 (N, 4, 16, 16)."""
    parts = torch.arange(len(images.scenes)).split(batch)
    return torch.cat([codec.encode(images.batch(part)).latent_dist.mean for part in parts])


def measure_latent_scale(codec: Any, images: ImageBatch) -> float:
    """Return one over the standard deviation of the latents of 512 images."""
    some = ImageBatch(images.scenes[:512], images.pixels_NCHW[:512])
    return round(1 / float(encode_means(codec, some).std()), 5)


def save_codec(codec: Any, directory: Path) -> None:
    """Write the codec as float16 safetensors in diffusers' own layout."""
    save_whole(directory, codec.half().save_pretrained)
    codec.float()


def save_whole(directory: Path, save: Callable[[Path], object]) -> None:
    """Let `save` write a directory, which appears complete or not at all."""
    scratch = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    save(scratch)
    shutil.rmtree(directory, ignore_errors=True)
    scratch.rename(directory)
