"""The interface of a system under evaluation: one function builds it, one method generates images.

To evaluate your own system, write a function `build(context: SystemContext) -> System` and name it
on the command line as `--system package.module:build`. The systems of d2i have the same form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from d2i.config import BackboneConfig, Recipe, SampleConfig
from d2i.diffusion.dpm_solver import OnStep
from d2i.encoders import Encoders
from d2i.errors import ConfigError, DataError
from d2i.eval.prompts import Prompt
from d2i.shards import ShardReader

if TYPE_CHECKING:
    from d2i.eval.systems.adapter import Adapter

IN_MEMORY = "memory"
"""The `source` of an image that never was a file."""


@dataclass(frozen=True)
class Generation:
    """The result of one prompt: an image, or the reason why there is none.

    Args:
        pixels: uint8 (H, W, 3) of any size, or None.
        reason: Without an image, one word to count the failure by, such as `not_finite`.
        source: `memory`, or format and size of the file it was read from, such as `jpg 256x256`.

    Raises:
        DataError: If it has neither image nor reason, or both, or pixels of another form.
    """

    pixels: NDArray[np.uint8] | None
    reason: str = ""
    source: str = IN_MEMORY

    def __post_init__(self) -> None:
        """Check that either an image or a reason is set, and the form of the pixels."""
        if (self.pixels is None) != bool(self.reason):
            got = "neither an image nor a reason" if self.pixels is None else "both"
            raise DataError(
                f"a system returned {got}; expected an image, or a one-word reason why there is "
                "none"
            )
        if self.pixels is None:
            return
        if self.pixels.dtype != np.uint8 or self.pixels.ndim != 3 or self.pixels.shape[2] != 3:
            raise DataError(
                f"a system returned {self.pixels.dtype} {self.pixels.shape}; expected uint8 "
                "(H, W, 3)"
            )


class System(Protocol):
    """Generates images.

    `described` goes into the metric card: hashes of weights, steps, everything that an image
    depends on. An evaluation resumes only with a system whose `described` is identical.
    """

    described: Mapping[str, Any]

    def generate(self, prompts: Sequence[Prompt]) -> list[Generation]:
        """Generate one image per prompt, in their order.

        An image must depend on its prompt and the system alone: not on the other prompts, their
        number, or earlier images. Where no image can be generated, the `Generation` has a reason;
        an exception ends the job.
        """
        ...


@dataclass(frozen=True)
class CallOptions:
    """Settings of one call of a system, instead of those that it was built with.

    Args:
        seeds: The seed of each prompt's noise.
        num_steps: Steps of the sampler; None for those of the settings.
        guidance_scale: None for that of the settings.
        on_step: Called at each step of each batch; see `d2i.load`.
    """

    seeds: Sequence[int]
    num_steps: int | None = None
    guidance_scale: float | None = None
    on_step: OnStep | None = None

    def applied(self, sample: SampleConfig) -> SampleConfig:
        """Return settings with the steps and the guidance of this call."""
        given = {"num_steps": self.num_steps, "guidance_scale": self.guidance_scale}
        return sample.model_copy(update={k: v for k, v in given.items() if v is not None})

    def are_default(self, sample: SampleConfig) -> bool:
        """Return whether these are the settings that a system was built with."""
        has_seed = all(seed == sample.seed for seed in self.seeds)
        return has_seed and self == CallOptions(self.seeds)


@runtime_checkable
class SeededSystem(System, Protocol):
    """A system whose seed, steps and guidance each call may choose."""

    def generate_seeded(self, prompts: Sequence[Prompt], options: CallOptions) -> list[Generation]:
        """Generate one image per prompt as `generate` does, with the options of this call."""
        ...


@dataclass(frozen=True)
class Read:
    """The part of a conversation that a text encoder is given.

    Args:
        text: The text that it is given, cut to its window, which may be inside a word. Of d2i's own
            networks it is cleaned as CLIP's tokenizer does; of a pipeline with several encoders,
            it is that of the longest window.
        tokens: Tokens of that text; the marks of start and end, and padding, are not counted, but
            those of a chat template are.
        cut: The text of the conversation that it is not given: what the window cuts off, and turns
            that `text.max_turns` or `text.cut=turn` leave out. It stands before `text` with
            `text.keep=end`, the default, and after it with `start`; empty if nothing is cut off.
    """

    text: str
    tokens: int
    cut: str


@runtime_checkable
class ReadingSystem(System, Protocol):
    """A system that tells what its text encoder is given."""

    def read(self, prompt: Prompt) -> Read:
        """Return what the text encoder is given for a prompt."""
        ...


def generate_with(
    system: System, name: str, sample: SampleConfig, prompts: Sequence[Prompt], options: CallOptions
) -> list[Generation]:
    """Generate with the options of a call, if the system can.

    Args:
        system: The system.
        name: Its name, for the error.
        sample: The settings that it was built with.
        prompts: The prompts.
        options: The options of this call.

    Raises:
        ConfigError: If the system generates with its settings alone, and these options differ.
    """
    if isinstance(system, SeededSystem):
        return system.generate_seeded(prompts, options)
    if not options.are_default(sample):
        raise ConfigError(
            f"{name} generates as it was loaded: got another seed, num_steps, guidance_scale or "
            f"on_step; expected seed={sample.seed} and none of the others; give its settings to "
            "d2i.load, such as settings=['sample.seed=7']"
        )
    return system.generate(prompts)


@dataclass(frozen=True)
class SystemSpec:
    """A system by name, before anything is loaded.

    Args:
        name: As given, with absolute paths: `KIND:TARGET`, or a backbone's name.
        label: Its name in tables.
        network: The network and its weights, of a run or a backbone.
        inner: The system that generates images from a Divter's captions.
        adapter: The LoRA adapter of a diffusers pipeline.
    """

    name: str
    label: str
    network: BackboneConfig | None = None
    inner: SystemSpec | None = None
    adapter: Adapter | None = None

    @property
    def kind(self) -> str:
        """The part of the name before the colon; a backbone's whole name."""
        return self.name.partition(":")[0]

    @property
    def target(self) -> str:
        """The part of the name after the colon, if any; for a Divter, the captioner's directory."""
        target = self.name.partition(":")[2]
        return target.removesuffix(f",{self.inner.name}") if self.inner else target

    @property
    def run_dir(self) -> str | None:
        """The run it comes from."""
        return self.target if self.kind == "run" else None

    @property
    def backbone(self) -> BackboneConfig:
        """The network and its weights.

        Raises:
            ConfigError: If this is neither a run nor a backbone.
        """
        if self.network is None:
            raise ConfigError(f"{self.name} has no backbone; expected run:DIR or a backbone's name")
        return self.network


@dataclass(frozen=True)
class SystemContext:
    """Inputs that a system is built from, in the process where it generates images.

    Args:
        spec: The system as parsed from `--system`.
        recipe: All settings.
        encoders: The recipe's frozen encoders.
        keys: The keys of all instances of the data set.
        device: The torch device to run on.
        open_shards: Opens a data set that the system reads.
    """

    spec: SystemSpec
    recipe: Recipe
    encoders: Encoders
    keys: Sequence[str]
    device: str
    open_shards: Callable[[str], ShardReader] = ShardReader


def expect_line(context: SystemContext) -> None:
    """Refuse to generate from the chats of a recipe with a system that reads lines alone.

    Raises:
        ConfigError: If the recipe has `text.format=chat`.
    """
    if context.recipe.text.format == "chat":
        raise ConfigError(
            f"--system {context.spec.name} reads a dialog as one line, got text.format=chat; "
            "expected line; give --set text.format=line --set text.roles=speaker"
        )
