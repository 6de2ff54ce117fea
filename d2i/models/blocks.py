"""Building blocks that U-ViT and UniDiffuser share: patches, time, positions, attention, MLP.

Shape letters: B batch, C channels, H and W latent height and width, L tokens, D features of one
token, N attention heads. Contains no network, reads no file; imports only d2i's errors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from d2i.errors import ConfigError

LATENT_CHANNELS = 4
MLP_RATIO = 4
INIT_STD = 0.02
MAX_PERIOD = 10_000
# Longest sequence for which `attend` holds all scores. U-ViT-S has 334 tokens, UniDiffuser-v1 1105
# or more.
MAX_WRITTEN_OUT = 512


def timestep_embedding(n_B: Tensor, dim: int) -> Tensor:
    """Compute the sinusoidal embedding of the model time, cosines first, always in float32.

    The float32 `exp` differs between CPUs and GPUs in the last bit, which becomes visible at an
    angle of 1000. So `exp` runs in float64 and is rounded once, which gives the same frequencies
    everywhere.

    Args:
        n_B: model time, 0..1000, integer or real.
        dim: features of one token; even.

    Returns:
        (B, 1, dim) float32.
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=n_B.device)
    frequencies = torch.exp((-math.log(MAX_PERIOD) * index / half).double()).float()
    angles = n_B.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)[:, None]


def patch_grid(latent_BCHW: Tensor, patch_size: int) -> tuple[int, int]:
    """Return the number of patch rows and columns of a latent.

    Raises:
        ConfigError: If its height or width is not a multiple of the patch size.
    """
    height, width = latent_BCHW.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ConfigError(
            f"the latent is {height} x {width}, expected multiples of the patch size {patch_size}; "
            "change the image size"
        )
    return height // patch_size, width // patch_size


def unpatchify(patches_BLP: Tensor, height: int, width: int, patch_size: int) -> Tensor:
    """Reassemble a latent from patches whose features are ordered (row, column, channel).

    Args:
        patches_BLP: (B, height/p * width/p, p * p * C).
        height: latent height.
        width: latent width.
        patch_size: p, edge of a patch in latent pixels.

    Returns:
        (B, C, height, width).
    """
    batch = patches_BLP.shape[0]
    grid = patches_BLP.reshape(
        batch, height // patch_size, width // patch_size, patch_size, patch_size, -1
    )
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, height, width)


def resize_positions(
    positions_1LD: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]
) -> Tensor:
    """Bilinearly resize the position embedding of the patches to another grid.

    Args:
        positions_1LD: (1, rows * columns, D) of `old_grid`.
        old_grid: (rows, columns) of patches that the embedding was built for.
        new_grid: (rows, columns) of patches to resize to.

    Returns:
        (1, rows * columns, D) of `new_grid`; the input itself if the grids are equal.
    """
    if old_grid == new_grid:
        return positions_1LD
    dim = positions_1LD.shape[-1]
    grid = positions_1LD.reshape(1, *old_grid, dim).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, size=new_grid, mode="bilinear", align_corners=False)
    return resized.flatten(2).transpose(1, 2)


def positions_at(
    positions_1LD: Tensor, num_prefix: int, side: int, grid: tuple[int, int]
) -> Tensor:
    """Return the position embedding of all tokens, its patch part resized to `grid`.

    Args:
        positions_1LD: (1, num_prefix + side * side, D).
        num_prefix: tokens before the patches.
        side: rows and columns of patches that the network was built for.
        grid: (rows, columns) of patches of the current latent.

    Returns:
        (1, num_prefix + rows * columns, D).
    """
    if grid == (side, side):
        return positions_1LD
    patches_1LD = resize_positions(positions_1LD[:, num_prefix:], (side, side), grid)
    return torch.cat([positions_1LD[:, :num_prefix], patches_1LD], dim=1)


def run_long_skips(
    in_blocks: Iterable[nn.Module],
    mid_block: nn.Module,
    out_blocks: Iterable[nn.Module],
    x_BLD: Tensor,
    *,
    recompute: bool,
) -> Tensor:
    """Run the blocks with long skips, from the last in block to the first out block and so on.

    Args:
        in_blocks: blocks whose outputs become the skips.
        mid_block: the one block without a skip.
        out_blocks: blocks called as `block(x, skip)`.
        x_BLD: tokens.
        recompute: gradient checkpointing, keep only each block's inputs for the backward pass.

    Returns:
        (B, L, D).
    """
    skips: list[Tensor] = []
    for block in in_blocks:
        x_BLD = _run_block(block, x_BLD, None, recompute=recompute)
        skips.append(x_BLD)
    x_BLD = _run_block(mid_block, x_BLD, None, recompute=recompute)
    for block in out_blocks:
        x_BLD = _run_block(block, x_BLD, skips.pop(), recompute=recompute)
    return x_BLD


def _run_block(
    block: nn.Module, x_BLD: Tensor, skip_BLD: Tensor | None, *, recompute: bool
) -> Tensor:
    output: Tensor
    if recompute and torch.is_grad_enabled():
        output = checkpoint(block, x_BLD, skip_BLD, use_reentrant=False)
    else:
        output = block(x_BLD, skip_BLD)
    return output


def init_published(module: nn.Module) -> None:
    """Initialise one module as published: linears truncated normal, all else as torch does."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def attend(q_BNLd: Tensor, k_BNLd: Tensor, v_BNLd: Tensor) -> Tensor:
    """Compute softmax(q k^T / sqrt(d)) v with the faster kernel.

    That is torch's fused attention, except for short sequences in bfloat16 on a CPU: there the
    fused kernel computes in float32 and takes three times as long as plain matrix products
    (measured in `benchmarks/README.md`).

    Args:
        q_BNLd: queries, (B, N, L, d).
        k_BNLd: keys, shaped as the queries.
        v_BNLd: values, shaped as the queries.

    Returns:
        (B, N, L, d), in the dtype of the inputs.
    """
    is_half_on_cpu = q_BNLd.device.type == "cpu" and q_BNLd.dtype == torch.bfloat16
    if not is_half_on_cpu or q_BNLd.shape[-2] > MAX_WRITTEN_OUT:
        return F.scaled_dot_product_attention(q_BNLd, k_BNLd, v_BNLd)
    scores_BNLL: Tensor = (q_BNLd * q_BNLd.shape[-1] ** -0.5) @ k_BNLd.transpose(-2, -1)
    return scores_BNLL.softmax(-1) @ v_BNLd


class PatchEmbed(nn.Module):
    """Patch embedding: latent (B, 4, H, W) to tokens (B, H/p * W/p, D), row by row."""

    def __init__(self, patch_size: int, dim: int) -> None:
        """Build the one strided convolution."""
        super().__init__()
        self.proj = nn.Conv2d(LATENT_CHANNELS, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, latent_BCHW: Tensor) -> Tensor:
        """Return the tokens of `latent_BCHW`."""
        tokens: Tensor = self.proj(latent_BCHW)
        return tokens.flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention whose fused projection has rows ordered (q, k, v), then head-major."""

    def __init__(self, dim: int, num_heads: int) -> None:
        """Build the two projections; q, k, v have no bias."""
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return (B, L, D)."""
        batch, length, dim = x_BLD.shape
        heads = (batch, length, 3, self.num_heads, dim // self.num_heads)
        q_BNLd, k_BNLd, v_BNLd = self.qkv(x_BLD).view(heads).permute(2, 0, 3, 1, 4).unbind(0)
        mixed_BNLd = attend(q_BNLd, k_BNLd, v_BNLd)
        output: Tensor = self.proj(mixed_BNLd.transpose(1, 2).reshape(batch, length, dim))
        return output


class Mlp(nn.Module):
    """Two linears with the exact (erf) GELU between them."""

    def __init__(self, dim: int) -> None:
        """Build the two linears."""
        super().__init__()
        self.fc1 = nn.Linear(dim, MLP_RATIO * dim)
        self.fc2 = nn.Linear(MLP_RATIO * dim, dim)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return (B, L, D)."""
        output: Tensor = self.fc2(F.gelu(self.fc1(x_BLD)))
        return output
