"""UniDiffuser v0 and v1, under their published key names.

Bao et al., "One Transformer Fits All Distributions in Multi-Modal Diffusion at Scale" (2023).
Tokens are [image time, text time, (v1: data type,) text, CLIP image, patches]; layer norms act
on the residual stream itself (post-LN). Shape letters as in `blocks`. Knows no files, no presets.
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

NUM_TIME_TOKENS = 2
NUM_CLIP_TOKENS = 1
NUM_DATA_TYPES = 2


class UniDiffuserBlock(nn.Module):
    """Post-LN transformer block; with a skip, it first merges the skip into its input."""

    def __init__(self, dim: int, num_heads: int, *, has_skip: bool) -> None:
        """Build the block; it has `norm1` only with a skip."""
        super().__init__()
        self.skip_linear = nn.Linear(2 * dim, dim) if has_skip else None
        self.norm1 = nn.LayerNorm(dim) if has_skip else None
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x_BLD: Tensor, skip_BLD: Tensor | None = None) -> Tensor:
        """Return (B, L, D)."""
        if self.skip_linear is not None and self.norm1 is not None and skip_BLD is not None:
            x_BLD = self.norm1(self.skip_linear(torch.cat([x_BLD, skip_BLD], dim=-1)))
        x_BLD = self.norm2(x_BLD + self.attn(x_BLD))
        output: Tensor = self.norm3(x_BLD + self.mlp(x_BLD))
        return output


class UniDiffuser(nn.Module):
    """One network for image and text: predicts the noise in latent, CLIP image and text."""

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
        clip_dim: int,
        has_data_type: bool = True,
        latent_scale: float = 0.18215,
        gradient_checkpointing: bool = False,
    ) -> None:
        """Build the network with the published initialisation.

        Args:
            latent_size: latent height and width that the positions belong to, in latent pixels.
            patch_size: edge of a patch in latent pixels.
            dim: features of one token.
            depth: blocks, counted as published: depth // 2 in, one mid, depth // 2 out.
            num_heads: attention heads.
            text_dim: features of one (reduced) text token.
            num_text_tokens: text tokens.
            clip_dim: features of the CLIP image embedding.
            has_data_type: v1, with its data type token; False is v0.
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
        self.clip_dim = clip_dim
        self.has_data_type = has_data_type
        self.latent_scale = latent_scale
        self.gradient_checkpointing = gradient_checkpointing
        side = latent_size // patch_size
        num_tokens = NUM_TIME_TOKENS + num_text_tokens + NUM_CLIP_TOKENS + side * side

        self.patch_embed = PatchEmbed(patch_size, dim)
        self.text_embed = nn.Linear(text_dim, dim)
        self.clip_img_embed = nn.Linear(clip_dim, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, dim))
        if has_data_type:
            self.token_embedding = nn.Embedding(NUM_DATA_TYPES, dim)
            self.pos_embed_token = nn.Parameter(torch.zeros(1, 1, dim))
            nn.init.trunc_normal_(self.pos_embed_token, std=INIT_STD)
        self.in_blocks = _blocks(depth // 2, dim, num_heads, has_skip=False)
        self.mid_block = UniDiffuserBlock(dim, num_heads, has_skip=False)
        self.out_blocks = _blocks(depth // 2, dim, num_heads, has_skip=True)
        self.norm = nn.LayerNorm(dim)
        self.decoder_pred = nn.Linear(dim, patch_size**2 * LATENT_CHANNELS)
        self.clip_img_out = nn.Linear(dim, clip_dim)
        self.text_out = nn.Linear(dim, text_dim)

        nn.init.trunc_normal_(self.pos_embed, std=INIT_STD)
        self.apply(init_published)

    def forward(
        self,
        latent: Tensor,
        clip_image: Tensor,
        text: Tensor,
        n_image: Tensor,
        n_text: Tensor,
        data_type: int | Tensor = 1,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Predict the noise in all three parts.

        Inputs of any float dtype are cast to the dtype of the weights.

        Args:
            latent: (B, 4, h, w) scaled, noised latent; h and w are multiples of the patch size.
            clip_image: (B, 1, C) noised CLIP image embedding.
            text: (B, T, D) noised or clean text features; T is `num_text_tokens`.
            n_image: (B,) model time of latent and CLIP image, 0..1000, integer or real.
            n_text: (B,) model time of the text; 0 means that it is clean.
            data_type: 1 for curated data (default), 0 for web data; (B,) for one per sample.
                v0 has no data type and ignores it.

        Returns:
            (eps_latent, eps_clip, eps_text), shaped as the three inputs.

        Raises:
            ConfigError: If h or w is not a multiple of the patch size.
        """
        height, width = latent.shape[-2:]
        grid = patch_grid(latent, self.patch_size)
        tokens_BLD = self._embed(latent, clip_image, text, n_image, n_text, data_type)
        x_BLD = run_long_skips(
            self.in_blocks,
            self.mid_block,
            self.out_blocks,
            tokens_BLD + self._positions(grid),
            recompute=self.gradient_checkpointing,
        )
        sizes = [self.num_text_tokens, NUM_CLIP_TOKENS, grid[0] * grid[1]]
        text_BTD, clip_B1D, patches_BLD = self.norm(x_BLD)[:, -sum(sizes) :].split(sizes, dim=1)
        predicted_BLP = self.decoder_pred(patches_BLD)
        eps_latent = unpatchify(predicted_BLP, height, width, self.patch_size)
        return eps_latent, self.clip_img_out(clip_B1D), self.text_out(text_BTD)

    def _embed(
        self,
        latent: Tensor,
        clip_image: Tensor,
        text: Tensor,
        n_image: Tensor,
        n_text: Tensor,
        data_type: int | Tensor,
    ) -> Tensor:
        """Return all tokens in order, without positions."""
        dtype = self.pos_embed.dtype
        tokens = [
            timestep_embedding(n_image, self.dim).to(dtype),
            timestep_embedding(n_text, self.dim).to(dtype),
        ]
        if self.has_data_type:
            tokens.append(self._data_type_token(data_type, latent))
        tokens += [
            self.text_embed(text.to(dtype)),
            self.clip_img_embed(clip_image.to(dtype)),
            self.patch_embed(latent.to(dtype)),
        ]
        return torch.cat(tokens, dim=1)

    def _data_type_token(self, data_type: int | Tensor, latent: Tensor) -> Tensor:
        if not isinstance(data_type, Tensor):
            data_type = torch.full((len(latent),), data_type, device=latent.device)
        token: Tensor = self.token_embedding(data_type)[:, None]
        return token

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """Return the position embedding of all tokens; the data type's is a separate parameter."""
        num_prefix = NUM_TIME_TOKENS + self.num_text_tokens + NUM_CLIP_TOKENS
        side = self.latent_size // self.patch_size
        positions_1LD = positions_at(self.pos_embed, num_prefix, side, grid)
        if not self.has_data_type:
            return positions_1LD
        times, others = positions_1LD[:, :NUM_TIME_TOKENS], positions_1LD[:, NUM_TIME_TOKENS:]
        return torch.cat([times, self.pos_embed_token, others], dim=1)


def _blocks(count: int, dim: int, num_heads: int, *, has_skip: bool) -> nn.ModuleList:
    return nn.ModuleList(UniDiffuserBlock(dim, num_heads, has_skip=has_skip) for _ in range(count))
