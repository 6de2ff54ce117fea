"""U-ViT, the text-to-image transformer with long skips, under its published key names.

Bao et al., "All are Worth Words: A ViT Backbone for Diffusion Models" (2023). Tokens are
[time, text, patches]. Shape letters as in `blocks`. Knows no files and no presets.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from d2i.models.blocks import (
    INIT_STD,
    LATENT_CHANNELS,
    Attention,
    Mlp,
    PatchEmbed,
    init_published,
    patch_grid,
    positions_at,
    run_long_skips,
    timestep_embedding,
    unpatchify,
)

NUM_TIME_TOKENS = 1


class UViTBlock(nn.Module):
    """Pre-LN transformer block; with a skip, it first merges the skip into its input."""

    def __init__(self, dim: int, num_heads: int, *, has_skip: bool) -> None:
        """Build the block."""
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim)
        self.skip_linear = nn.Linear(2 * dim, dim) if has_skip else None

    def forward(self, x_BLD: Tensor, skip_BLD: Tensor | None = None) -> Tensor:
        """Return (B, L, D)."""
        if self.skip_linear is not None and skip_BLD is not None:
            x_BLD = self.skip_linear(torch.cat([x_BLD, skip_BLD], dim=-1))
        x_BLD = x_BLD + self.attn(self.norm1(x_BLD))
        output: Tensor = x_BLD + self.mlp(self.norm2(x_BLD))
        return output


class UViT(nn.Module):
    """U-ViT text-to-image: predicts the noise in a latent, given time and text features."""

    def __init__(
        self,
        *,
        latent_size: int,
        patch_size: int,
        dim: int,
        depth: int,
        num_heads: int,
        text_dim: int,
        num_text_tokens: int,
        latent_scale: float = 0.23010,
        gradient_checkpointing: bool = False,
    ) -> None:
        """Build the network with the published initialisation.

        Args:
            latent_size: latent height and width that the positions belong to, in latent pixels.
            patch_size: edge of a patch in latent pixels.
            dim: features of one token.
            depth: blocks, counted as published: depth // 2 in, one mid, depth // 2 out.
            num_heads: attention heads.
            text_dim: features of one text token.
            num_text_tokens: text tokens.
            latent_scale: factor from raw VAE latents to the network's inputs; not a weight.
            gradient_checkpointing: recompute each block in the backward pass.
        """
        super().__init__()
        self.latent_size = latent_size
        self.patch_size = patch_size
        self.dim = dim
        self.text_dim = text_dim
        self.num_time_tokens = NUM_TIME_TOKENS
        self.num_text_tokens = num_text_tokens
        self.latent_scale = latent_scale
        self.gradient_checkpointing = gradient_checkpointing
        side = latent_size // patch_size
        num_tokens = NUM_TIME_TOKENS + num_text_tokens + side * side

        self.patch_embed = PatchEmbed(patch_size, dim)
        self.context_embed = nn.Linear(text_dim, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, dim))
        self.in_blocks = _blocks(depth // 2, dim, num_heads, has_skip=False)
        self.mid_block = UViTBlock(dim, num_heads, has_skip=False)
        self.out_blocks = _blocks(depth // 2, dim, num_heads, has_skip=True)
        self.norm = nn.LayerNorm(dim)
        self.decoder_pred = nn.Linear(dim, patch_size**2 * LATENT_CHANNELS)
        self.final_layer = nn.Conv2d(LATENT_CHANNELS, LATENT_CHANNELS, 3, padding=1)

        nn.init.trunc_normal_(self.pos_embed, std=INIT_STD)
        self.apply(init_published)

    def forward(self, latent: Tensor, n: Tensor, text: Tensor) -> Tensor:
        """Predict the noise eps in a noised latent.

        Inputs of any float dtype are cast to the dtype of the weights.

        Args:
            latent: (B, 4, h, w) scaled, noised latent; h and w are multiples of the patch size.
            n: (B,) model time in 1..1000, integer or real.
            text: (B, T, D) text features; T is `num_text_tokens`.

        Returns:
            (B, 4, h, w) predicted noise, in the dtype of the weights (or autocast's).

        Raises:
            ConfigError: If h or w is not a multiple of the patch size.
        """
        dtype = self.pos_embed.dtype
        height, width = latent.shape[-2:]
        grid = patch_grid(latent, self.patch_size)
        num_prefix = NUM_TIME_TOKENS + self.num_text_tokens
        time_B1D = timestep_embedding(n, self.dim).to(dtype)
        text_BTD = self.context_embed(text.to(dtype))
        patches_BLD = self.patch_embed(latent.to(dtype))
        x_BLD = torch.cat([time_B1D, text_BTD, patches_BLD], dim=1)
        side = self.latent_size // self.patch_size
        x_BLD = x_BLD + positions_at(self.pos_embed, num_prefix, side, grid)

        x_BLD = run_long_skips(
            self.in_blocks,
            self.mid_block,
            self.out_blocks,
            x_BLD,
            recompute=self.gradient_checkpointing,
        )
        predicted_BLP = self.decoder_pred(self.norm(x_BLD))[:, num_prefix:]
        eps: Tensor = self.final_layer(unpatchify(predicted_BLP, height, width, self.patch_size))
        return eps


def _blocks(count: int, dim: int, num_heads: int, *, has_skip: bool) -> nn.ModuleList:
    return nn.ModuleList(UViTBlock(dim, num_heads, has_skip=has_skip) for _ in range(count))
