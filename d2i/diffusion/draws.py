"""Random numbers of a sample, keyed by (seed, purpose, sample key, step).

A draw depends on nothing else: not on its batch, the ranks or restarts. Each sample has its own
counter-based Philox generator. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from d2i.config import NUM_NOISE_LEVELS

Shape = tuple[int, ...]


def normal(
    seed: int, purpose: str, keys: Sequence[str], step: int, shape: Shape = ()
) -> npt.NDArray[np.float32]:
    """Draw standard normal numbers, one array of `shape` for each sample.

    Args:
        seed: the seed of the run.
        purpose: the use of the numbers, such as `noise`; purposes are independent.
        keys: one sample key for each row.
        step: training step, or number of a sampler's call; steps are independent.
        shape: shape of one sample's numbers.

    Returns:
        (B, *shape) float32.
    """

    def fill(generator: np.random.Generator, row: npt.NDArray[Any]) -> None:
        generator.standard_normal(dtype=np.float32, out=row)

    return _rows(fill, np.float32, seed, purpose, keys, step, shape)


def uniform(
    seed: int, purpose: str, keys: Sequence[str], step: int, shape: Shape = ()
) -> npt.NDArray[np.float32]:
    """Draw uniform numbers in [0, 1), one array of `shape` for each sample; see `normal`.

    Returns:
        (B, *shape) float32.
    """

    def fill(generator: np.random.Generator, row: npt.NDArray[Any]) -> None:
        generator.random(dtype=np.float32, out=row)

    return _rows(fill, np.float32, seed, purpose, keys, step, shape)


def integers(
    low: int,
    high: int,
    seed: int,
    purpose: str,
    keys: Sequence[str],
    step: int,
    shape: Shape = (),
) -> npt.NDArray[np.int64]:
    """Draw uniform integers in low..high, both ends included; see `normal`.

    Returns:
        (B, *shape) int64.
    """

    def fill(generator: np.random.Generator, row: npt.NDArray[Any]) -> None:
        row[:] = generator.integers(low, high, size=row.size, endpoint=True)

    return _rows(fill, np.int64, seed, purpose, keys, step, shape)


@dataclass(frozen=True)
class BatchDraws:
    """Random draws for a micro batch of training.

    Args:
        seed: Seed of the run.
        keys: Key of each sample.
        step: Step that the draws belong to.
        purpose: Prefix of every purpose; empty for training.
    """

    seed: int
    keys: Sequence[str]
    step: int
    purpose: str = ""

    def normal(self, name: str, shape: Shape) -> npt.NDArray[np.float32]:
        """Draw standard normal numbers, (B, *shape) float32; see `normal`."""
        return normal(self.seed, f"{self.purpose}{name}", self.keys, self.step, shape)

    def uniform(self, name: str) -> npt.NDArray[np.float32]:
        """Draw a number in [0, 1) for each sample, (B,) float32."""
        return uniform(self.seed, f"{self.purpose}{name}", self.keys, self.step)

    def model_times(self, name: str) -> npt.NDArray[np.int64]:
        """Draw a model time in 1..1000 for each sample, (B,) int64."""
        return integers(
            1, NUM_NOISE_LEVELS, self.seed, f"{self.purpose}{name}", self.keys, self.step
        )


@dataclass(frozen=True)
class SampleDraws:
    """Random draws for a batch of images, each with its own key and seed.

    Args:
        seeds: Seed of each image.
        keys: Key of each image.
        purpose: Prefix of every purpose.
    """

    seeds: Sequence[int]
    keys: Sequence[str]
    purpose: str = "sample"

    def normal(self, part: str, shape: Shape, step: int = 0) -> npt.NDArray[np.float32]:
        """Draw standard normal numbers, (B, *shape) float32; see `normal`.

        Args:
            part: What they are for: '' is the image at the start, others begin with a dot.
            shape: Shape of one image's numbers.
            step: Number of the sampler's call.
        """
        purpose = f"{self.purpose}{part}"
        rows = [
            normal(seed, purpose, [key], step, shape)
            for seed, key in zip(self.seeds, self.keys, strict=True)
        ]
        return np.concatenate(rows)

    def generator_seeds(self, part: str) -> list[int]:
        """Draw a seed for each image, for generators that are not d2i's own."""
        return [
            int(integers(0, 2**63 - 1, seed, f"{self.purpose}{part}", [key], 0)[0])
            for seed, key in zip(self.seeds, self.keys, strict=True)
        ]


def _rows(
    fill: Callable[[np.random.Generator, npt.NDArray[Any]], None],
    dtype: type[np.generic],
    seed: int,
    purpose: str,
    keys: Sequence[str],
    step: int,
    shape: Shape,
) -> npt.NDArray[Any]:
    philox = np.random.Philox(key=0)
    generator = np.random.Generator(philox)
    start = philox.state
    rows = np.empty((len(keys), math.prod(shape)), dtype=dtype)
    philox_keys = _philox_keys(seed, purpose, keys, step)
    for row, philox_key in zip(rows, philox_keys, strict=True):
        # Setting the state is equivalent to a new Philox(key=...), in a third of the time.
        start["state"]["key"][:] = philox_key
        philox.state = start
        fill(generator, row)
    return rows.reshape(len(keys), *shape)


def _philox_keys(
    seed: int, purpose: str, keys: Sequence[str], step: int
) -> Iterator[npt.NDArray[np.uint64]]:
    """Yield the 128-bit generator key of each sample; a NUL separates sample key and rest."""
    prefix = json.dumps([int(seed), purpose, int(step)]).encode() + b"\0"
    shared = hashlib.blake2b(prefix, digest_size=16)
    for key in keys:
        digest = shared.copy()
        digest.update(key.encode())
        yield np.frombuffer(digest.digest(), dtype="<u8")
