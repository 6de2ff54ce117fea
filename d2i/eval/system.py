"""What a system is to the evaluation: one function builds it, one method draws.

A system of one's own is a function `build(context: SystemContext) -> System`, named on the command
line as `--system package.module:build`. The systems of d2i are built by functions of the same form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from d2i.config import Recipe
from d2i.encoders import Encoders
from d2i.errors import DataError
from d2i.eval.prompts import Prompt
from d2i.shards import ShardReader

if TYPE_CHECKING:
    from d2i.eval.systems import SystemSpec

IN_MEMORY = "memory"
"""The `source` of a picture that never was a file."""


@dataclass(frozen=True)
class Generation:
    """What became of one prompt: a picture, or the reason why there is none.

    Args:
        pixels: uint8 (H, W, 3) of any size, or None.
        reason: Without a picture, one word for the count of failures, such as `not_finite`.
        source: `memory`, or form and size of the file it was read from, such as `jpg 256x256`.

    Raises:
        DataError: If it has neither picture nor reason, or both, or pixels of another form.
    """

    pixels: NDArray[np.uint8] | None
    reason: str = ""
    source: str = IN_MEMORY

    def __post_init__(self) -> None:
        """Refuse what could not be told apart later on."""
        if (self.pixels is None) != bool(self.reason):
            got = "neither picture nor reason" if self.pixels is None else "both"
            raise DataError(
                f"a system drew {got}; expected a picture, or one word why there is none"
            )
        if self.pixels is None:
            return
        if self.pixels.dtype != np.uint8 or self.pixels.ndim != 3 or self.pixels.shape[2] != 3:
            raise DataError(
                f"a system drew {self.pixels.dtype} {self.pixels.shape}; expected uint8 (H, W, 3)"
            )


class System(Protocol):
    """Draws pictures.

    `described` goes into the metric card: hashes of weights, steps, whatever decides a picture.
    An evaluation goes on only with a system that is described by the very same.
    """

    described: Mapping[str, Any]

    def generate(self, prompts: Sequence[Prompt]) -> list[Generation]:
        """Generate one image a prompt, in their order.

        An image must be a function of its prompt and of the system alone: neighbours, their number
        and what was generated before change nothing. Where no image can be generated, the
        `Generation` has a reason; an exception ends the job.
        """
        ...


@dataclass(frozen=True)
class SystemContext:
    """What a system is built from, in the process where it draws.

    Args:
        spec: The system as it was named.
        recipe: All settings.
        encoders: The recipe's frozen encoders.
        keys: The keys of all instances that are to be drawn.
        device: The torch device to work on.
        open_shards: Opens a data set that the system reads.
    """

    spec: SystemSpec
    recipe: Recipe
    encoders: Encoders
    keys: Sequence[str]
    device: str
    open_shards: Callable[[str], ShardReader] = ShardReader
