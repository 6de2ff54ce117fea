"""The demo's backbone: a small U-ViT trained to generate images from one-sentence captions.

It never sees a dialog: understanding dialogs is left to fine-tuning. Most of a caption's 77-token
window is padding, so most steps run on the first tokens only, 2.6 times as fast; the last steps run
on whole windows, as everything after does.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.demo_weights.clip import ClipPair
from benchmarks.demo_weights.images import ImageBatch
from benchmarks.demo_weights.texts import caption_windows
from benchmarks.demo_weights.vae import encode_means
from d2i.config import BackboneConfig
from d2i.diffusion import noise_prediction_loss
from d2i.models import build_backbone, save_weights
from d2i.models.model_dir import write_config
from d2i.tokenize import WINDOW_LENGTH, encode, window

# The longest caption has 22 tokens, its start and end included.
NUM_CAPTION_TOKENS = 24

_BATCH = 64
_PEAK_LR = 2e-3
_DROPOUT = 0.1
_NUM_CAPTIONS = 16
_CHECKPOINT_S = 60.0


@dataclass(frozen=True)
class Phase:
    """A training phase: the number of text tokens that it reads, and its learning rate schedule."""

    name: str
    num_text_tokens: int
    num_steps: int
    num_warmup_steps: int
    is_last: bool

    def learning_rate(self, step: int) -> float:
        """Return the rate: linear warm-up to the peak; in the last phase, linear decay to 0."""
        if step < self.num_warmup_steps:
            return _PEAK_LR * (step + 1) / self.num_warmup_steps
        if not self.is_last:
            return _PEAK_LR
        return _PEAK_LR * (self.num_steps - step) / (self.num_steps - self.num_warmup_steps)


PHASES = (
    Phase("captions", NUM_CAPTION_TOKENS, 5000, 200, is_last=False),
    Phase("windows", WINDOW_LENGTH, 1000, 50, is_last=True),
)


@dataclass(frozen=True)
class Pool:
    """The training data of the backbone.

    Args:
        latents: float32 (N, 4, 16, 16), unscaled.
        windows: int64 (C, N, 77): C captions per image, as true CLIP ids.
        clip: encodes the windows.
    """

    latents: Tensor
    windows: Tensor
    clip: ClipPair


def backbone_config(latent_scale: float) -> BackboneConfig:
    """Return the sizes of the demo's U-ViT."""
    return BackboneConfig(
        name="uvit-s",
        latent_scale=latent_scale,
        latent_size=16,
        patch_size=4,
        dim=128,
        depth=7,
        num_heads=4,
        text_dim=64,
        num_text_tokens=WINDOW_LENGTH,
    )


def build_pool(codec: Any, clip: ClipPair, images: ImageBatch, seed: int) -> Pool:
    """Encode every image, and make 16 captions of each."""
    captions = [caption_windows(images.scenes, seed + i).windows_NT for i in range(_NUM_CAPTIONS)]
    return Pool(encode_means(codec, images), torch.stack(captions), clip)


def train_network(
    config: BackboneConfig, pool: Pool, seed: int, directory: Path
) -> dict[str, Tensor]:
    """Train phase by phase, resuming from `directory` where an earlier call was interrupted.

    Returns:
        The weights, by published key. The learning rate ends at 0, so they need no averaging.
    """
    weights: dict[str, Tensor] | None = None
    for phase in PHASES:
        network = _build(config, phase.num_text_tokens, seed)
        if weights is not None:
            network.load_state_dict(extend_text_positions(weights, phase.num_text_tokens))
        _train_phase(network, phase, pool, float(config.latent_scale or 1.0), seed, directory)
        weights = network.state_dict()
    return weights or {}


def extend_text_positions(weights: dict[str, Tensor], num_text_tokens: int) -> dict[str, Tensor]:
    """Return the weights for longer windows: the last text position is repeated for added ones.

    Args:
        weights: of a network of `NUM_CAPTION_TOKENS` text tokens; `pos_embed` is (1, L, D), its
            tokens [time, text, patches].
        num_text_tokens: text tokens of the network to load them into.
    """
    last = 1 + NUM_CAPTION_TOKENS
    positions = weights["pos_embed"]
    added = positions[:, last - 1 : last].repeat(1, num_text_tokens - NUM_CAPTION_TOKENS, 1)
    widened = torch.cat([positions[:, :last], added, positions[:, last:]], dim=1)
    return weights | {"pos_embed": widened}


def save_network(weights: dict[str, Tensor], config: BackboneConfig, directory: Path) -> None:
    """Write the model directory: float16 safetensors under published keys, and the sizes."""
    directory.mkdir(parents=True, exist_ok=True)
    save_weights({k: v.half() for k, v in weights.items()}, directory / "model.safetensors")
    write_config(directory, config)


def _build(config: BackboneConfig, num_text_tokens: int, seed: int) -> nn.Module:
    """Build the network, with linear layers initialised at std 1 / sqrt(inputs).

    The published initialisation (0.02) is meant for widths of 512 and more and learns more slowly
    at 128.
    """
    torch.manual_seed(seed)
    overrides = config.overrides() | {"num_text_tokens": num_text_tokens}
    network = build_backbone(config.name, **overrides)
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return network


def _train_phase(
    network: nn.Module, phase: Phase, pool: Pool, scale: float, seed: int, directory: Path
) -> None:
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=_PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    scratch = directory / f"backbone-{phase.name}.pt"
    first = _resume(scratch, network, optimizer)
    saved = started = time.monotonic()
    for step in range(first, phase.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = phase.learning_rate(step)
        step_seed = (seed * 100 + phase.num_text_tokens) * 1_000_000 + step
        generator = torch.Generator().manual_seed(step_seed)
        loss = _loss(network, pool, phase.num_text_tokens, scale, generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            rate = (step + 1 - first) * _BATCH / (time.monotonic() - started)
            print(
                f"{phase.name} step {step} of {phase.num_steps}: loss {loss.item():.4f}, "
                f"{rate:.0f} images/s",
                flush=True,
            )
        if time.monotonic() - saved > _CHECKPOINT_S:
            _save(scratch, network, optimizer, step + 1)
            saved = time.monotonic()
    if first < phase.num_steps:
        _save(scratch, network, optimizer, phase.num_steps)


def _loss(
    network: nn.Module, pool: Pool, num_text_tokens: int, scale: float, generator: torch.Generator
) -> Tensor:
    chosen = torch.randint(len(pool.latents), (_BATCH,), generator=generator)
    caption = torch.randint(len(pool.windows), (_BATCH,), generator=generator)
    windows = pool.windows[caption, chosen]
    empty = torch.from_numpy(window(encode("")).astype("int64"))
    windows[torch.rand(_BATCH, generator=generator) < _DROPOUT] = empty
    with torch.no_grad():
        # The text tower is causal, so later tokens do not change the first states.
        text = pool.clip.hidden(windows[:, :num_text_tokens])
    latent = scale * pool.latents[chosen]
    noise = torch.randn(latent.shape, generator=generator)
    # High noise decides what an image shows, so times are drawn with a density that rises in n.
    n = (torch.rand(_BATCH, generator=generator).sqrt() * 1000).ceil().clamp(1, 1000).long()
    return noise_prediction_loss(network, latent, text, n, noise).mean()


def _save(scratch: Path, network: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    state = {
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
    }
    torch.save(state, scratch.with_suffix(".tmp"))
    scratch.with_suffix(".tmp").replace(scratch)


def _resume(scratch: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    if not scratch.exists():
        return 0
    state = torch.load(scratch, weights_only=True)
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])
