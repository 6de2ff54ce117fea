"""The part of a family that flow transformers share: velocities, their noise levels, and text.

Their text encoders are language models, whose states are too large for shards.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from d2i.config import NUM_NOISE_LEVELS, TrainConfig, Weighting
from d2i.diffusion.draws import BatchDraws
from d2i.diffusion.flow import FlowSchedule, flow_loss, published_schedule, shifted_schedule
from d2i.errors import ConfigError
from d2i.models.base import Architecture, Conditions, State
from d2i.models.image_codec import VaeNumbers
from d2i.models.pipeline_dir import PipelineDirectory
from d2i.models.pipeline_family import PipelineFamily


class FlowFamily(PipelineFamily):
    """A transformer that predicts velocities, within a pipeline of diffusers.

    A network built as a directory describes it also has `vae_numbers`, those of its autoencoder.

    Attributes:
        text_dim_setting: The name in the network's config of the width of a text token.
        published_shift: The static shift of the published scheduler's file, for a network that no
            directory describes.
        has_one_length: True if all texts are filled up to that length.
        marks: Names of tensors that no other family's networks have.
    """

    text_dim_setting: ClassVar[str]
    published_shift: ClassVar[float] = 1.0
    has_one_length: ClassVar[bool] = True
    marks: ClassVar[tuple[str, ...]]

    @property
    def encoders(self) -> tuple[str, ...]:  # type: ignore[override]
        """The array of the codec; text is encoded while training."""
        return (self.codec.array, "text")

    def add_sizes(self, network: Any, latent_size: int) -> None:
        """Set the sizes of a transformer; see `PipelineFamily.add_sizes`."""
        network.latent_size = latent_size
        network.num_text_tokens = self.num_text_tokens if self.has_one_length else None
        network.text_dim = network.config[self.text_dim_setting]
        network.downsampling = self.codec.factor

    def add_numbers(self, network: Any, directory: PipelineDirectory) -> None:
        """Set scheduler and autoencoder's numbers; see `PipelineFamily.add_numbers`."""
        network.scheduler = directory.scheduler()
        network.vae_numbers = self.codec.numbers(directory.without_weights("vae"))

    def clean(self, line: str) -> str:
        """Return the line itself: language models read letters of both cases, and every sign."""
        return line

    def vae_numbers(self, network: Any) -> VaeNumbers:
        """Return the numbers that normalise the latents of a network."""
        numbers: VaeNumbers = network.vae_numbers
        return numbers

    def draw_levels(self, draws: BatchDraws, config: TrainConfig) -> NDArray[Any]:
        """Draw u for each sample, (B,) float32: uniform, or logit-normal for `report`."""
        if config.objective == "script":
            return draws.uniform("n")
        return (1.0 / (1.0 + np.exp(-draws.normal("n", ())))).astype(np.float32)

    def model_times(self, draw: Tensor) -> Tensor:
        """Return n (B,), where 1000 is the noisiest row of the table."""
        return NUM_NOISE_LEVELS - (draw * NUM_NOISE_LEVELS).long().clamp(max=NUM_NOISE_LEVELS - 1)

    def flow_schedule(self, network: Any, objective: str, latent: Tensor) -> FlowSchedule:
        """Return the noise levels that a network is trained on.

        Args:
            network: The network.
            objective: `script` for those of its scheduler's file, or `report`.
            latent: (B, C, h, w) normalised latents, whose size the report's may depend on.
        """
        if objective == "report":
            return self.report_schedule(latent)
        scheduler = getattr(network, "scheduler", None)
        if scheduler is None:
            return shifted_schedule(self.published_shift)
        return published_schedule(scheduler.config)

    def report_schedule(self, latent: Tensor) -> FlowSchedule:
        """Return the noise levels of the technical report; see `flow_schedule`.

        Raises:
            ConfigError: If none says others than the published script, as for most families.
        """
        del latent
        raise ConfigError(
            f"objective=report: no technical report of {self.name} says another objective than its "
            "published script; expected script"
        )

    def losses(
        self,
        network: Any,
        vae: VaeNumbers | nn.Module,
        raw: Tensor,
        noise: Tensor,
        draw: Tensor,
        conditions: Conditions,
        weighting: Weighting = "none",
        objective: str = "script",
        **options: Any,
    ) -> Tensor:
        """Return the flow-matching loss, (B,); see `Family.losses`.

        Raises:
            ConfigError: If there is no such weighting.
        """
        del options
        latent = self.codec.normalised(raw, self.codec.numbers_of(vae))
        schedule = self.flow_schedule(network, objective, latent)

        def predict(noised: Tensor, timestep: Tensor) -> Tensor:
            return self.predict(network, noised, timestep, conditions)

        return flow_loss(predict, latent, noise.reshape(latent.shape), draw, schedule, weighting)

    def loss_options(self, config: TrainConfig) -> dict[str, Any]:
        """Return the weighting of noise levels, and the objective."""
        return {"weighting": config.weighting, "objective": config.objective}

    def detect(self, state: State) -> Architecture | None:
        """Recognise the transformer by names that no other has."""
        if not self.presets.sizes or not all(mark in state for mark in self.marks):
            return None
        (name,) = self.presets.sizes
        return Architecture(name, f"transformer of {name}", {})

    def example_inputs(self, network: Any) -> tuple[Any, ...]:
        """Return (latent, timestep, conditions) of one image, with the longest text."""
        latent = self.patches(torch.empty(1, *self.codec.latent_shape(network.latent_size)))
        text = torch.empty(1, self.num_text_tokens, network.text_dim)
        conditions = {"text": text}
        if self.has_one_length:
            conditions["mask"] = torch.ones(1, self.num_text_tokens, dtype=torch.bool)
        return latent, torch.ones(1), conditions

    def call(self, network: Any, *inputs: Any) -> Any:
        """Predict the velocity, given (latent, timestep, conditions)."""
        return self.predict(network, *inputs)


class LossFamily(FlowFamily):
    """A flow transformer of which d2i has the loss alone: no text, and no sampler."""

    def prompt_arguments(self, conditions: Conditions, unconditional: Conditions) -> dict[str, Any]:
        """Raise `ConfigError`."""
        del conditions, unconditional
        raise self._loss_alone()

    def encode_prompts(self, pipeline: Any, texts: list[str], device: str) -> dict[str, Tensor]:
        """Raise `ConfigError`."""
        del pipeline, texts, device
        raise self._loss_alone()

    def _loss_alone(self) -> ConfigError:
        return ConfigError(
            f"{self.name}: d2i has its loss alone; evaluate it as --system diffusers:DIR"
        )
