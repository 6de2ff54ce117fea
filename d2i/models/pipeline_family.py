"""The part of a family that all networks of diffusers share: the pipeline that they belong to.

One directory gives network, autoencoder, text encoders and scheduler, so that parts of different
models cannot be mixed up. Classes, and what a pipeline does, are diffusers' own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_unshuffle

from d2i.config import BackboneConfig, SampleConfig
from d2i.diffusion.dpm_solver import OnStep
from d2i.diffusion.draws import SampleDraws
from d2i.diffusion.samplers import draw_noise
from d2i.diffusion.schedulers import step_arguments, with_numbers_of
from d2i.errors import ConfigError
from d2i.models.base import Conditions, OneTensorFamily, SampleLatents
from d2i.models.pipeline_dir import PipelineDirectory
from d2i.models.registry import family_of_backbone
from d2i.models.weights.load import fill_network
from d2i.tokenize import clean


class PipelineFamily(OneTensorFamily):
    """A network of a pipeline of diffusers.

    A network built as a directory describes it also has `scheduler`, diffusers' object of its
    scheduler file, and `downsampling`, pixels to a raw latent pixel.

    Attributes:
        published: The arguments of the published network that are not diffusers' defaults.
        other_parts: The pipeline's arguments for the parts that latents do not depend on.
        num_text_tokens: Tokens of the longest text.
    """

    published: ClassVar[Mapping[str, Any]]
    other_parts: ClassVar[Mapping[str, Any]]
    num_text_tokens: ClassVar[int] = 77

    @property
    def network_class(self) -> Any:
        """The class of diffusers' network."""
        import diffusers

        return getattr(diffusers, self.presets.network)

    def build(self, backbone: str, sizes: Mapping[str, Any]) -> nn.Module:
        """Build the published network."""
        del backbone
        network: Any = self.network_class(**self.published)
        self.add_sizes(network, sizes["latent_size"])
        built: nn.Module = network
        return built

    def build_described(self, path: str, backbone: BackboneConfig) -> nn.Module:
        """Build the network that a directory describes, with its scheduler; see `Family`.

        Raises:
            CheckpointError: If this is not a directory of the family's pipeline.
        """
        directory = self.directory(path)
        config = directory.part_config(self.presets.network_part)
        network: nn.Module = self.network_class.from_config(config)
        self.add_sizes(network, backbone.latent_size or int(config["sample_size"]))
        self.add_numbers(network, directory)
        return network

    @abstractmethod
    def add_sizes(self, network: Any, latent_size: int) -> None:
        """Set the sizes that a network of this family has; see `Family`."""

    @abstractmethod
    def add_numbers(self, network: Any, directory: PipelineDirectory) -> None:
        """Set the numbers that the directory of a network's pipeline gives."""

    def directory(self, path: str) -> PipelineDirectory:
        """Open a directory of the family's pipeline; see `PipelineDirectory`."""
        return PipelineDirectory(path, self.presets)

    def load(self, path: str, network: nn.Module) -> nn.Module:
        """Load the network's weights from the directory of a pipeline."""
        directory = self.directory(path)
        return fill_network(network, dict(directory.network_weights()), path)

    def blocks(self, network: Any) -> Iterator[nn.Module]:
        """Yield the blocks that diffusers names for compiling one by one; else those of its lists.

        diffusers names none for some networks.
        """
        if names := network._repeated_blocks:
            yield from (module for module in network.modules() if type(module).__name__ in names)
            return
        lists = (part for part in network.children() if isinstance(part, nn.ModuleList))
        yield from (block for part in lists for block in part)

    def recompute_blocks(self, network: Any) -> None:
        """Recompute blocks in the backward pass."""
        network.enable_gradient_checkpointing()

    def sampler(
        self, network: Any, settings: SampleConfig, unconditional: Conditions
    ) -> SampleLatents:
        """Return the stock pipeline, started from keyed noise; see `Family.sampler`."""
        import diffusers

        pipeline: Any = getattr(diffusers, self.presets.pipeline or "")(
            **{self.presets.network_part: network},
            scheduler=with_numbers_of(network.scheduler, settings.sampler),
            **self.other_parts,
        )
        pipeline.vae_scale_factor = network.downsampling
        pipeline.set_progress_bar_config(disable=True)
        side = network.latent_size * network.downsampling
        shape = self.codec.latent_shape(network.latent_size)
        dtype = input_dtype(network)

        def sample(
            conditions: Conditions, draws: SampleDraws, on_step: OnStep | None = None
        ) -> Tensor:
            start = draw_noise(draws, "", shape, conditions["text"].device)
            given = {name: _as(dtype, value) for name, value in conditions.items()}
            latents: Tensor = pipeline(
                latents=self.patches(start),
                num_inference_steps=settings.num_steps,
                guidance_scale=settings.guidance_scale,
                height=side,
                width=side,
                output_type="latent",
                **step_arguments(on_step, sides=self.patches(start).shape[2:]),
                **self.prompt_arguments(given, unconditional),
                **self.presets.call_options,
                **settings.pipeline,
            ).images
            return self.patches(latents)

        return sample

    def patches(self, latents: Tensor) -> Tensor:
        """Return raw latents (B, C, h, w) in the codec's patches, as the pipeline takes them."""
        return pixel_unshuffle(latents, self.codec.patch_size)

    def clean(self, line: str) -> str:
        """Return the text of a line as it is trained on: as CLIP's tokenizer cleans it."""
        return clean(line)

    @abstractmethod
    def prompt_arguments(self, conditions: Conditions, unconditional: Conditions) -> dict[str, Any]:
        """Return the pipeline's arguments for conditions (B, ...) and those of ''."""

    @abstractmethod
    def encode_prompts(self, pipeline: Any, texts: list[str], device: str) -> dict[str, Tensor]:
        """Encode N texts as the pipeline does: conditions by name, each (N, ...)."""

    def unconditional(self, pipeline: Any, size: int, device: str) -> dict[str, Tensor]:
        """Encode what the pipeline guides away from, `size` times, as `encode_prompts`."""
        return self.encode_prompts(pipeline, [""] * size, device)


def pipeline_family(backbone: str) -> PipelineFamily:
    """Return the family of a backbone that belongs to a pipeline of diffusers.

    Raises:
        ConfigError: If there is no such backbone, or it belongs to none.
    """
    found = family_of_backbone(backbone)
    if not isinstance(found, PipelineFamily):
        raise ConfigError(f"{backbone} is no network of a diffusers pipeline; expected one")
    return found


def input_dtype(network: nn.Module) -> torch.dtype:
    """Return the dtype in which a network holds its own weights, beside those of an adapter."""
    return next(network.parameters()).dtype


def _as(dtype: torch.dtype, value: Tensor) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def pad_rows(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return texts of different lengths as `text` (N, T, D), filled with 0, and `mask` (N, T)."""
    text = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=text.device)
    return {
        "text": text,
        "mask": torch.arange(text.shape[1], device=text.device) < lengths[:, None],
    }
