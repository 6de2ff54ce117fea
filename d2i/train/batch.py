"""One micro batch: what is read from the shards, and every random draw for it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2i.config import TrainConfig
from d2i.diffusion.draws import integers, normal, uniform
from d2i.shards import ShardReader

_NUM_MODEL_TIMES = 1000


@dataclass(frozen=True)
class Batch:
    """Tensors of one micro batch of B samples.

    Args:
        keys: The samples' keys.
        moments: (B, 8, h, w) unscaled VAE moments.
        text: (B, 77 W, text_dim) text latents, those of '' where the condition is dropped.
        latent_noise: (B, 4, h, w) standard normal, to draw latents from the moments.
        noise: (B, 4, h, w) standard normal, to be predicted.
        n: (B,) int64 model times in 1..1000, of the image.
        joint: What UniDiffuser's joint loss needs beside it, else None.
    """

    keys: tuple[str, ...]
    moments: Tensor
    text: Tensor
    latent_noise: Tensor
    noise: Tensor
    n: Tensor
    joint: Joint | None = None

    def to(self, device: torch.device) -> Batch:
        """Return the batch on another device."""
        return _moved(self, device)


@dataclass(frozen=True)
class Joint:
    """The parts of a joint batch that a text-to-image one lacks.

    Args:
        clip: (B, 1, clip_dim) CLIP image embeddings.
        clip_noise: Standard normal, shaped as `clip`.
        text_noise: Standard normal, shaped as the text latents.
        n_text: (B,) int64 model times in 1..1000, of the text.
    """

    clip: Tensor
    clip_noise: Tensor
    text_noise: Tensor
    n_text: Tensor

    def to(self, device: torch.device) -> Joint:
        """Return the parts on another device."""
        return _moved(self, device)


T = TypeVar("T", "Batch", "Joint")


def _moved(part: T, device: torch.device) -> T:
    values = {f.name: getattr(part, f.name) for f in fields(part)}
    return replace(part, **{k: v.to(device) for k, v in values.items() if hasattr(v, "to")})


class BatchReader:
    """Reads micro batches one ahead of their use, in a thread of its own."""

    def __init__(self, reader: ShardReader, config: TrainConfig, *, is_joint: bool) -> None:
        self._reader = reader
        self._config = config
        self._is_joint = is_joint
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batch-reader")

    def request(self, indices: NDArray[np.int64], step: int) -> Future[Batch]:
        """Start reading a micro batch."""
        return self._thread.submit(self.read, indices, step)

    def read(self, indices: NDArray[np.int64], step: int) -> Batch:
        """Read a micro batch and make its draws."""
        members = ("moments", "text", "clip") if self._is_joint else ("moments", "text")
        arrays = self._reader.read(indices, members=members)
        keys = tuple(self._reader.keys[int(i)] for i in indices)
        text = self._with_dropped_conditions(arrays["text"].astype(np.float32), keys, step)
        moments, seed = arrays["moments"], self._config.seed
        shape = (4, *moments.shape[2:])
        return Batch(
            keys=keys,
            moments=_tensor(moments),
            text=_tensor(text),
            latent_noise=_tensor(normal(seed, "latent", keys, step, shape)),
            noise=_tensor(normal(seed, "noise", keys, step, shape)),
            n=torch.from_numpy(integers(1, _NUM_MODEL_TIMES, seed, "n", keys, step)),
            joint=self._joint(arrays["clip"], text, keys, step) if self._is_joint else None,
        )

    def _joint(
        self,
        clip: NDArray[np.float16],
        text: NDArray[np.float32],
        keys: Sequence[str],
        step: int,
    ) -> Joint:
        seed = self._config.seed
        return Joint(
            clip=_tensor(clip[:, None]),
            clip_noise=_tensor(normal(seed, "noise.clip", keys, step, (1, clip.shape[1]))),
            text_noise=_tensor(normal(seed, "noise.text", keys, step, text.shape[1:])),
            n_text=torch.from_numpy(integers(1, _NUM_MODEL_TIMES, seed, "n.text", keys, step)),
        )

    def close(self) -> None:
        """Stop the reading thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _with_dropped_conditions(
        self, text: NDArray[np.float32], keys: Sequence[str], step: int
    ) -> NDArray[np.float32]:
        share = self._config.condition_dropout
        dropped = uniform(self._config.seed, "drop", keys, step) < share
        text[dropped] = self._reader.empty_text
        return text


def _tensor(array: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).float()
