"""The part of a family that Stable Diffusion 1.5 and XL share: diffusers' UNet and its pipeline.

One directory gives network, autoencoder, text encoders and scheduler, so that parts of different
models cannot be mixed up. Classes, and what a pipeline does, are diffusers' own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from d2i.config import BackboneConfig, SampleConfig
from d2i.diffusion.draws import SampleDraws
from d2i.diffusion.samplers import draw_noise
from d2i.diffusion.schedule import Schedule, default_schedule
from d2i.diffusion.schedulers import with_numbers_of
from d2i.models.base import Architecture, Conditions, OneTensorFamily, SampleLatents, State
from d2i.models.pipeline_dir import PipelineDirectory
from d2i.models.weights.load import fill_network

_NUM_TEXT_TOKENS = 77
_DOWNSAMPLING = 8


class StableDiffusionFamily(OneTensorFamily):
    """A UNet that predicts noise, within a pipeline of diffusers.

    A network built as a directory describes it also has `schedule`, the noise schedule of its
    scheduler file; `scheduler`, diffusers' object of that file; and `downsampling`, pixels to a
    latent pixel.

    Attributes:
        published: The arguments of the published UNet that are not diffusers' defaults.
        other_parts: The pipeline's arguments for the parts that latents do not depend on.
        has_added: True if the network is given more than the text.
    """

    published: ClassVar[Mapping[str, Any]]
    other_parts: ClassVar[Mapping[str, Any]]
    has_added: ClassVar[bool] = False

    def build(self, backbone: str, sizes: Mapping[str, Any]) -> nn.Module:
        """Build the published UNet."""
        del backbone
        from diffusers import UNet2DConditionModel

        network: Any = UNet2DConditionModel(**self.published)
        _add_sizes(network, sizes["latent_size"])
        built: nn.Module = network
        return built

    def build_described(self, path: str, backbone: BackboneConfig) -> nn.Module:
        """Build the UNet that a directory describes, with its scheduler; see `Family`.

        Raises:
            CheckpointError: If this is not a directory of the family's pipeline.
        """
        from diffusers import UNet2DConditionModel

        directory = self.directory(path)
        config = directory.part_config(self.presets.network_part)
        network: nn.Module = UNet2DConditionModel.from_config(config)
        _add_sizes(network, backbone.latent_size or int(config["sample_size"]))
        _add_numbers(network, directory)
        return network

    def directory(self, path: str) -> PipelineDirectory:
        """Open a directory of the family's pipeline; see `PipelineDirectory`."""
        return PipelineDirectory(path, self.presets)

    def load(self, path: str, network: nn.Module) -> nn.Module:
        """Load the UNet's weights from the directory of a pipeline."""
        directory = self.directory(path)
        return fill_network(network, dict(directory.network_weights()), path)

    def blocks(self, network: Any) -> Iterator[nn.Module]:
        """Yield the blocks that diffusers names for compiling one by one."""
        names = network._repeated_blocks
        yield from (module for module in network.modules() if type(module).__name__ in names)

    def recompute_blocks(self, network: Any) -> None:
        """Recompute blocks in the backward pass."""
        network.enable_gradient_checkpointing()

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

    def sampler(
        self, network: Any, settings: SampleConfig, unconditional: Conditions
    ) -> SampleLatents:
        """Return the stock pipeline, started from keyed noise; see `Family.sampler`."""
        import diffusers

        pipeline: Any = getattr(diffusers, self.presets.pipeline or "")(
            unet=network,
            scheduler=with_numbers_of(network.scheduler, settings.sampler),
            **self.other_parts,
        )
        pipeline.vae_scale_factor = network.downsampling
        pipeline.set_progress_bar_config(disable=True)
        side = network.latent_size * network.downsampling
        shape = self.codec.latent_shape(network.latent_size)

        def sample(conditions: Conditions, draws: SampleDraws) -> Tensor:
            latents: Tensor = pipeline(
                latents=draw_noise(draws, "", shape, conditions["text"].device),
                num_inference_steps=settings.num_steps,
                guidance_scale=settings.guidance_scale,
                height=side,
                width=side,
                output_type="latent",
                **self.prompt_arguments(conditions, unconditional),
                **settings.pipeline,
            ).images
            return latents

        return sample

    def prompt_arguments(
        self, conditions: Conditions, unconditional: Conditions
    ) -> dict[str, Tensor]:
        """Return the pipeline's arguments for conditions (B, ...) and those of ''."""
        text = conditions["text"]  # (B, T, D)
        empty = unconditional["text"].to(text).expand_as(text)
        return {"prompt_embeds": text, "negative_prompt_embeds": empty}

    def detect(self, state: State) -> Architecture | None:
        """Recognise the UNet by its text projections and its added conditions."""
        is_unet = {"conv_in.weight", "time_embedding.linear_1.weight"} <= state.keys()
        has_text = any(".attn2.to_k.weight" in key for key in state)
        has_added = "add_embedding.linear_1.weight" in state
        if not (is_unet and has_text) or has_added != self.has_added:
            return None
        (name,) = self.presets.sizes
        return Architecture(name, f"UNet of {name}", {})


def _add_sizes(network: Any, latent_size: int) -> None:
    network.latent_size = latent_size
    network.num_text_tokens = _NUM_TEXT_TOKENS
    network.text_dim = network.config.cross_attention_dim
    network.downsampling = _DOWNSAMPLING


def _add_numbers(network: Any, directory: PipelineDirectory) -> None:
    vae = directory.part_config("vae")
    network.latent_scale = float(vae["scaling_factor"])
    network.downsampling = 2 ** (len(vae["block_out_channels"]) - 1)
    network.scheduler = directory.scheduler()
    network.schedule = Schedule(directory.betas())
