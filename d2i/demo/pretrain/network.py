"""The demo's backbone: a small U-ViT that learns to draw from one-sentence captions.

It never sees a dialog: understanding conversations is what fine-tuning is there to teach. Latents
and text latents of a pool of pictures and captions are made once and held in memory.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2i.config import BackboneConfig
from d2i.demo.pretrain.clip import ClipPair
from d2i.demo.pretrain.codec import encode_means, learning_rate
from d2i.demo.pretrain.pictures import Pictures
from d2i.demo.pretrain.texts import caption_windows
from d2i.diffusion import uvit_loss
from d2i.models import build_backbone, save_weights
from d2i.models.folder import write_config
from d2i.tokenize import encode, window

_BATCH = 64
_PEAK_LR = 2e-3
_DROPOUT = 0.1
_NUM_CAPTIONS = 3
_CHECKPOINT_S = 60.0


@dataclass(frozen=True)
class Pool:
    """What the backbone trains on.

    Args:
        latents: float32 (N, 4, 16, 16), unscaled.
        texts: float16 (C, N, 77, 64): C captions a picture.
        empty_text: float16 (77, 64), of ''.
    """

    latents: Tensor
    texts: Tensor
    empty_text: Tensor


def backbone_config(latent_scale: float) -> BackboneConfig:
    """The sizes of the demo's U-ViT."""
    return BackboneConfig(
        name="uvit-s",
        latent_scale=latent_scale,
        latent_size=16,
        patch_size=4,
        dim=128,
        depth=7,
        num_heads=4,
        text_dim=64,
        num_text_tokens=77,
    )


@torch.no_grad()
def build_pool(codec: Any, clip: ClipPair, pictures: Pictures, seed: int) -> Pool:
    """Encode every picture, and a few captions of each."""
    captions = [
        _hidden(clip, caption_windows(pictures.scenes, seed + i).windows_NT)
        for i in range(_NUM_CAPTIONS)
    ]
    empty = torch.from_numpy(window(encode("")).astype("int64"))[None]
    return Pool(encode_means(codec, pictures), torch.stack(captions), _hidden(clip, empty)[0])


def train_network(
    config: BackboneConfig, pool: Pool, num_steps: int, seed: int, scratch: Path
) -> dict[str, Tensor]:
    """Train, continuing from `scratch` where an earlier call was cut off.

    Returns:
        The weights, by published key. The learning rate ends at 0, so they need no averaging.
    """
    torch.manual_seed(seed)
    network = build_backbone(config.name, **config.overrides())
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=_PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    first = _resume(scratch, network, optimizer)
    saved = started = time.monotonic()
    for step in range(first, num_steps):
        for group in optimizer.param_groups:
            group["lr"] = _PEAK_LR * learning_rate(step, num_steps, warm_up=200)
        loss = _loss(network, pool, float(config.latent_scale or 1.0), seed, step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            rate = (step + 1 - first) * _BATCH / (time.monotonic() - started)
            print(f"network step {step}/{num_steps} {loss.item():.4f} {rate:.0f}/s", flush=True)
        if time.monotonic() - saved > _CHECKPOINT_S:
            _save(scratch, network, optimizer, step + 1)
            saved = time.monotonic()
    _save(scratch, network, optimizer, num_steps)
    return network.state_dict()


def save_network(weights: dict[str, Tensor], config: BackboneConfig, folder: Path) -> None:
    """Write the model folder: float16 safetensors under published keys, and the sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    save_weights({k: v.half() for k, v in weights.items()}, folder / "model.safetensors")
    write_config(folder, config)


def _loss(network: nn.Module, pool: Pool, scale: float, seed: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    chosen = torch.randint(len(pool.latents), (_BATCH,), generator=generator)
    caption = torch.randint(len(pool.texts), (_BATCH,), generator=generator)
    text = pool.texts[caption, chosen].float()
    text[torch.rand(_BATCH, generator=generator) < _DROPOUT] = pool.empty_text.float()
    latent = scale * pool.latents[chosen]
    noise = torch.randn(latent.shape, generator=generator)
    # What a picture shows is decided at high noise: times are drawn with density rising in n.
    n = (torch.rand(_BATCH, generator=generator).sqrt() * 1000).ceil().clamp(1, 1000).long()
    return uvit_loss(network, latent, text, n, noise).mean()


@torch.no_grad()
def _hidden(clip: ClipPair, windows: Tensor, batch: int = 512) -> Tensor:
    return torch.cat([clip.hidden(part).half() for part in windows.split(batch)])


def _save(
    scratch: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
) -> None:
    state = {
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
    }
    torch.save(state, scratch.with_suffix(".tmp"))
    scratch.with_suffix(".tmp").replace(scratch)


def _resume(
    scratch: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> int:
    if not scratch.exists():
        return 0
    state = torch.load(scratch, weights_only=True)
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])
