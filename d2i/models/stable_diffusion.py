"""The part of a family that Stable Diffusion 1.5 and XL share: diffusers' UNet."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from d2i.diffusion.schedule import Schedule, default_schedule
from d2i.models.base import Architecture, Conditions, State
from d2i.models.pipeline_dir import PipelineDirectory
from d2i.models.pipeline_family import PipelineFamily

_NUM_TEXT_TOKENS = 77
_DOWNSAMPLING = 8


class StableDiffusionFamily(PipelineFamily):
    """A UNet that predicts noise, within a pipeline of diffusers.

    A network built as a directory describes it also has `schedule`, the noise schedule of its
    scheduler file.

    Attributes:
        has_added: True if the network is given more than the text.
    """

    has_added: ClassVar[bool] = False

    def add_sizes(self, network: Any, latent_size: int) -> None:
        """Set the sizes of a UNet; see `PipelineFamily.add_sizes`."""
        network.latent_size = latent_size
        network.num_text_tokens = _NUM_TEXT_TOKENS
        network.text_dim = network.config.cross_attention_dim
        network.downsampling = _DOWNSAMPLING

    def add_numbers(self, network: Any, directory: PipelineDirectory) -> None:
        """Set the latents' scale, and the noise schedule; see `PipelineFamily.add_numbers`."""
        vae = directory.part_config("vae")
        network.latent_scale = float(vae["scaling_factor"])
        network.downsampling = 2 ** (len(vae["block_out_channels"]) - 1)
        network.scheduler = directory.scheduler()
        network.schedule = Schedule(directory.betas())

    def schedule(self, network: Any) -> Schedule:
        """Return the noise schedule of the network's scheduler file."""
        found: Schedule = getattr(network, "schedule", None) or default_schedule()
        return found

    def predict(self, network: Any, latent: Tensor, n: Tensor, conditions: Conditions) -> Tensor:
        """Predict the noise; diffusers counts time from 0. See `OneTensorFamily.predict`."""
        dtype = network.conv_in.weight.dtype
        predicted: Tensor = network(
            latent.to(dtype),
            n - 1,
            conditions["text"].to(dtype),
            added_cond_kwargs=self.added(conditions),
            return_dict=False,
        )[0]
        return predicted

    def added(self, conditions: Conditions) -> dict[str, Tensor] | None:
        """Return the conditions beside the text, by diffusers' names."""
        del conditions
        return None

    def prompt_arguments(self, conditions: Conditions, unconditional: Conditions) -> dict[str, Any]:
        """Return the pipeline's arguments for conditions (B, ...) and those of ''."""
        text = conditions["text"]  # (B, T, D)
        empty = unconditional["text"].to(text).expand_as(text)
        return {"prompt_embeds": text, "negative_prompt_embeds": empty}

    def encode_prompts(self, pipeline: Any, texts: list[str], device: str) -> dict[str, Tensor]:
        """Return the last states, and the pooled text where there is one."""
        return self._encode(pipeline, texts, device, is_negative=False)

    def unconditional(self, pipeline: Any, size: int, device: str) -> dict[str, Tensor]:
        """Return those of '' or, where the pipeline says so, zeros."""
        return self._encode(pipeline, [""] * size, device, is_negative=True)

    def _encode(
        self, pipeline: Any, texts: list[str], device: str, *, is_negative: bool
    ) -> dict[str, Tensor]:
        outputs = pipeline.encode_prompt(
            prompt=texts,
            device=device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=is_negative,
        )
        # Text and that of '', then pooled text and that of ''.
        names = ("text", "pooled")[: len(outputs) // 2]
        return {name: outputs[2 * index + is_negative] for index, name in enumerate(names)}

    def detect(self, state: State) -> Architecture | None:
        """Recognise the UNet by its text projections and its added conditions."""
        is_unet = {"conv_in.weight", "time_embedding.linear_1.weight"} <= state.keys()
        has_text = any(".attn2.to_k.weight" in key for key in state)
        has_added = "add_embedding.linear_1.weight" in state
        if not (is_unet and has_text) or has_added != self.has_added:
            return None
        (name,) = self.presets.sizes
        return Architecture(name, f"UNet of {name}", {})
