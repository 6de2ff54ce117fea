"""The interface of a family of networks: all that training, sampling and weights know of it.

A family is a directory of `d2i.models` with the same files each: `presets` (names and sizes,
without torch), `model` (the network), `family` (a subclass of `Family`), and what else it needs.
Nothing outside asks which family a network is of. docs/extending.md adds one step by step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from d2i.backbones import Presets, presets_of_family
from d2i.config import BackboneConfig, SampleConfig, TrainConfig, Weighting
from d2i.diffusion.dpm_solver import OnStep
from d2i.diffusion.draws import BatchDraws, SampleDraws
from d2i.diffusion.guidance import guided
from d2i.diffusion.losses import noise_prediction_loss
from d2i.diffusion.samplers import draw_noise, run_sampler
from d2i.diffusion.schedule import Schedule, default_schedule
from d2i.models.image_codec import KL_F8C4, ImageCodec, VaeNumbers

State = Mapping[str, Tensor]
Conditions = Mapping[str, Tensor]
"""The inputs of a network beside the noised image, by name; `text` (B, T, D) always.

`mask` (B, T) is true where a row has text, for families whose texts differ in length.
"""


class SampleLatents(Protocol):
    """From the conditions and draws of B images to latents (B, C, h, w) at the network's scale."""

    def __call__(
        self, conditions: Conditions, draws: SampleDraws, on_step: OnStep | None = None
    ) -> Tensor:
        """Generate the latents.

        Args:
            conditions: As `Family.conditions` returns them, as tensors.
            draws: The source of the noise.
            on_step: Called with the number of a step, from 1, and the latents (B, C, h, w) that it
                predicts, at the network's scale; see `run_sampler`.
        """
        ...


@dataclass(frozen=True)
class Layout:
    """Names of weights in another program.

    Args:
        matches: Returns whether tensors are in this layout.
        to_published: Renames tensors of this layout to the published names; unknown ones stay.
        from_published: The reverse.
        config: From a network to the `config.json` that the other program builds it from.
    """

    matches: Callable[[State], bool]
    to_published: Callable[[State], dict[str, Tensor]]
    from_published: Callable[[State], dict[str, Tensor]]
    config: Callable[[Any], dict[str, Any]]


@dataclass(frozen=True)
class Architecture:
    """A network recognised by the names and shapes of its tensors.

    Args:
        backbone: Its preset; of several with these names, the first.
        title: A description for people, without sizes.
        sizes: The sizes that the shapes reveal, by the names of `build_backbone`.
    """

    backbone: str
    title: str
    sizes: Mapping[str, int]


class Family(ABC):
    """A family of networks.

    Its networks have the attributes `latent_size`, `text_dim`, `num_text_tokens` (None if texts
    differ in length), and `latent_scale` (the factor from raw VAE latents) or `vae_numbers`.

    Attributes:
        name: As `d2i.backbones.FAMILIES` has it.
        codec: The latents that it is trained on.
        encoders: The arrays of a sample that it is trained on; `text` may be encoded meanwhile.
        reads_sizes: True if its conditions depend on the original sizes of images.
        layouts: Other programs' names for its weights, by the program's name.
    """

    name: ClassVar[str]
    codec: ClassVar[ImageCodec] = KL_F8C4
    encoders: ClassVar[tuple[str, ...]] = ("moments", "text")
    reads_sizes: ClassVar[bool] = False
    layouts: ClassVar[Mapping[str, Layout]] = MappingProxyType({})

    @property
    def presets(self) -> Presets:
        """Its backbones by name, with their sizes."""
        return presets_of_family(self.name)

    @abstractmethod
    def build(self, backbone: str, sizes: Mapping[str, Any]) -> nn.Module:
        """Build a network, freshly initialised, in float32; `sizes` are checked and complete."""

    def build_described(self, path: str, backbone: BackboneConfig) -> nn.Module | None:
        """Build the network that the directory of its weights describes, without them.

        Args:
            path: Of the weights.
            backbone: The sizes that the recipe sets.

        Returns:
            None if the backbone's name and sizes describe it, as by default.
        """
        del path, backbone
        return None

    @abstractmethod
    def load(self, path: str, network: nn.Module) -> nn.Module:
        """Load published weights into a network, fitted to its sizes, and return it.

        Raises:
            CheckpointError: If they cannot be read or do not fit; see `d2i.models.load_weights`.
        """

    @abstractmethod
    def detect(self, state: State) -> Architecture | None:
        """Recognise tensors under published names; None if they are not of this family."""

    @abstractmethod
    def blocks(self, network: Any) -> Iterable[nn.Module]:
        """Return the repeated blocks of a network, which `torch.compile` compiles one by one."""

    def recompute_blocks(self, network: Any) -> None:
        """Recompute blocks in the backward pass, which takes less memory and a third more work."""
        network.gradient_checkpointing = True

    @abstractmethod
    def example_inputs(self, network: Any) -> tuple[Any, ...]:
        """Return the inputs of one image, for a network on torch's current default device.

        For several images, `d2i.train.activations` repeats every tensor whose first axis has length
        1, and every list; other tensors are shared by all images.
        """

    @abstractmethod
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
        """Return the loss of each image, (B,).

        Args:
            network: A network of this family, or an engine around it.
            vae: The numbers that normalise raw latents, or the autoencoder that has them.
            raw: (B, C, h, w) raw latents.
            noise: (B, C, h, w) standard normal.
            draw: (B,) noise levels, as `draw_levels` returns them: int64 as diffusers counts them,
                t in 0..999, n is t + 1; for flow matching float32 u in 0..1.
            conditions: As `conditions` returns them, as tensors.
            **options: As `loss_options` returns them.
        """

    @abstractmethod
    def sampler(
        self, network: Any, settings: SampleConfig, unconditional: Conditions
    ) -> SampleLatents:
        """Return the guided sampler of a network.

        Args:
            network: A network of this family.
            settings: Sampler, steps and guidance.
            unconditional: The conditions of the empty text, without a batch axis.
        """

    def vae_numbers(self, network: Any) -> VaeNumbers:
        """Return the numbers that normalise the latents of a network."""
        return {"scaling_factor": network.latent_scale}

    def draw_levels(self, draws: BatchDraws, config: TrainConfig) -> NDArray[Any]:
        """Draw the noise level of each sample of a training batch, (B,); see `losses`."""
        del config
        return draws.model_times("n") - 1

    def model_times(self, draw: Tensor) -> Tensor:
        """Return the model times n (B,) int64 in 1..1000 of noise levels; 1000 is pure noise."""
        return draw + 1

    def conditions(
        self, arrays: Mapping[str, NDArray[Any]], draws: BatchDraws
    ) -> dict[str, NDArray[Any]]:
        """Return the conditions of a training batch.

        Args:
            arrays: The arrays of `encoders`, each (B, ...); `text`, and what else its encoder
                gives, is that of '' where dropped; and where `reads_sizes`, `sizes` (B, 2): height
                and width of the original image in pixels, 0 where unknown.
            draws: The random draws of the batch.
        """
        del draws
        return {name: arrays[name] for name in ("text", "mask") if name in arrays}

    def loss_options(self, config: TrainConfig) -> dict[str, Any]:
        """Return the keyword arguments that a recipe gives to `losses`."""
        del config
        return {}

    def flops(self, network: Any) -> int:
        """Count the FLOP of one image, forward; a multiply-add counts as two.

        Args:
            network: A network on the `meta` device, without gradients.
        """
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            self.call(network, *self.example_inputs(network))
        return int(counter.get_total_flops())

    def call(self, network: Any, *inputs: Any) -> Any:
        """Run a network on inputs in the form of `example_inputs`."""
        return network(*inputs)


class OneTensorFamily(Family):
    """A family whose networks predict the noise of the latent alone, given time and conditions."""

    def schedule(self, network: Any) -> Schedule:
        """Return the noise schedule that a network is trained on."""
        del network
        return default_schedule()

    def predict(self, network: Any, latent: Tensor, n: Tensor, conditions: Conditions) -> Tensor:
        """Predict the noise (B, C, h, w) of noised latents at model times n (B,)."""
        predicted: Tensor = network(latent, n, conditions["text"])
        return predicted

    def losses(
        self,
        network: Any,
        vae: VaeNumbers | nn.Module,
        raw: Tensor,
        noise: Tensor,
        draw: Tensor,
        conditions: Conditions,
        weighting: Weighting = "none",
        **options: Any,
    ) -> Tensor:
        """Return the mean squared error of the predicted noise, (B,); see `Family.losses`.

        Raises:
            ConfigError: If there is no such weighting.
        """
        del options
        predict = partial(self.predict, network)
        latent = self.codec.normalised(raw, self.codec.numbers_of(vae))  # (B, C, h, w)
        return noise_prediction_loss(
            predict, latent, conditions, draw + 1, noise, self.schedule(network), weighting
        )

    def loss_options(self, config: TrainConfig) -> dict[str, Any]:
        """Return the weighting of noise levels."""
        return {"weighting": config.weighting}

    def sampler(
        self, network: Any, settings: SampleConfig, unconditional: Conditions
    ) -> SampleLatents:
        """Return a sampler of latents, guided by the conditions; see `Family.sampler`."""
        predict = partial(self.predict, network)

        def sample(
            conditions: Conditions, draws: SampleDraws, on_step: OnStep | None = None
        ) -> Tensor:
            eps = guided(predict, conditions, unconditional, settings.guidance_scale)
            shape = self.codec.latent_shape(network.latent_size)
            start = draw_noise(draws, "", shape, conditions["text"].device)  # (B, C, h, w)
            steps = settings.num_steps
            return run_sampler(settings.sampler, eps, start, steps, draws, on_step)

        return sample

    def example_inputs(self, network: Any) -> tuple[Any, ...]:
        """Return (latent, n, text) of one image."""
        latent = torch.empty(1, *self.codec.latent_shape(network.latent_size))
        return latent, torch.ones(1), torch.empty(1, network.num_text_tokens, network.text_dim)
