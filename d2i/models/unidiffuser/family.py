"""UniDiffuser as a family: it predicts latent, CLIP embedding and text, each with its own noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from d2i.config import SampleConfig, TrainConfig
from d2i.diffusion.dpm_solver import OnStep
from d2i.diffusion.draws import BatchDraws, SampleDraws
from d2i.diffusion.samplers import draw_noise, run_sampler
from d2i.models.base import Architecture, Conditions, Layout, SampleLatents, State
from d2i.models.image_codec import VaeNumbers
from d2i.models.long_skips import LongSkipFamily
from d2i.models.positions import published_sizes
from d2i.models.unidiffuser.guidance import guided_unidiffuser, join_state, split_state
from d2i.models.unidiffuser.layout import (
    diffusers_config,
    from_diffusers,
    is_diffusers,
    to_diffusers,
)
from d2i.models.unidiffuser.model import NUM_CLIP_TOKENS, NUM_TIME_TOKENS, UniDiffuser
from d2i.models.unidiffuser.objective import unidiffuser_loss


class UniDiffuserFamily(LongSkipFamily):
    """UniDiffuser v0 and v1."""

    name = "unidiffuser"
    encoders = ("moments", "clip", "text")
    layouts: ClassVar = {
        "diffusers": Layout(is_diffusers, from_diffusers, to_diffusers, diffusers_config)
    }

    def build(self, backbone: str, sizes: Mapping[str, Any]) -> UniDiffuser:
        """Build a UniDiffuser; v0 has no data type."""
        return UniDiffuser(**sizes, has_data_type=backbone != "unidiffuser-v0")

    def detect(self, state: State) -> Architecture | None:
        """Recognise UniDiffuser by its CLIP and text projections, and v1 by its data types."""
        if not {"clip_img_embed.weight", "text_embed.weight"} <= state.keys():
            return None
        num_others = NUM_TIME_TOKENS + NUM_CLIP_TOKENS
        sizes = published_sizes(state, text="text_embed.weight", num_others=num_others)
        clip = state["clip_img_embed.weight"]
        if sizes is None or clip.dim() != 2:
            return None
        version = "v1" if "token_embedding.weight" in state else "v0"
        return Architecture(
            f"unidiffuser-{version}",
            f"UniDiffuser {version}",
            sizes | {"clip_dim": clip.shape[-1]},
        )

    def example_inputs(self, network: Any) -> tuple[Tensor, ...]:
        """Return (latent, clip_image, text, n_image, n_text) of one image."""
        latent = torch.empty(1, *self.codec.latent_shape(network.latent_size))
        text = torch.empty(1, network.num_text_tokens, network.text_dim)
        return latent, torch.empty(1, 1, network.clip_dim), text, torch.ones(1), torch.ones(1)

    def conditions(
        self, arrays: Mapping[str, NDArray[Any]], draws: BatchDraws
    ) -> dict[str, NDArray[Any]]:
        """Return text and CLIP embedding, each with its noise, and the model time of the text.

        Returns:
            `text` (B, T, D) and `clip` (B, 1, C), `text_noise` and `clip_noise` shaped as they are,
            and `n_text` (B,) int64 in 1..1000.
        """
        clip, text = arrays["clip"][:, None], arrays["text"]
        return {
            "text": text,
            "clip": clip,
            "clip_noise": draws.normal("noise.clip", clip.shape[1:]),
            "text_noise": draws.normal("noise.text", text.shape[1:]),
            "n_text": draws.model_times("n.text"),
        }

    def loss_options(self, config: TrainConfig) -> dict[str, Any]:
        """Return the settings of `train.unidiffuser`."""
        options = config.unidiffuser
        return {"kind": options.loss, "weights": options.weights, "data_type": options.data_type}

    def losses(
        self,
        network: Any,
        vae: VaeNumbers | nn.Module,
        raw: Tensor,
        noise: Tensor,
        draw: Tensor,
        conditions: Conditions,
        **options: Any,
    ) -> Tensor:
        """Return `unidiffuser_loss`, (B,); see `Family.losses`."""
        latent = self.codec.normalised(raw, self.codec.numbers_of(vae))
        parts = (latent, conditions["clip"], conditions["text"])
        noises = (noise, conditions["clip_noise"], conditions["text_noise"])
        n_text = conditions["n_text"]
        return unidiffuser_loss(network, parts, draw + 1, n_text, noises, **options)

    def sampler(
        self, network: Any, settings: SampleConfig, unconditional: Conditions
    ) -> SampleLatents:
        """Return a sampler of latent and CLIP embedding as one state; see `Family.sampler`."""
        shape = self.codec.latent_shape(network.latent_size)

        def sample(
            conditions: Conditions, draws: SampleDraws, on_step: OnStep | None = None
        ) -> Tensor:
            text, device = conditions["text"], conditions["text"].device
            eps = guided_unidiffuser(
                network,
                text,
                settings.guidance_scale,
                shape,
                unconditional=settings.unconditional,
                text_noise=lambda call: draw_noise(draws, ".text", text.shape[1:], device, call),
                empty_text=unconditional["text"],
                data_type=settings.data_type,
            )
            start = join_state(
                draw_noise(draws, "", shape, device),
                draw_noise(draws, ".clip", (1, network.clip_dim), device),
            )

            def on_state(step: int, state: Tensor) -> None:
                if on_step:
                    on_step(step, split_state(state, shape)[0])

            steps, watch = settings.num_steps, on_state if on_step else None
            state = run_sampler(settings.sampler, eps, start, steps, draws, watch)
            return split_state(state, shape)[0]

        return sample


FAMILY = UniDiffuserFamily()
