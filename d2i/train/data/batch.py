"""Micro batches: their data, prefetched from the shards, and every random draw for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2i.config import TrainConfig
from d2i.diffusion.draws import BatchDraws
from d2i.models.base import Family

if TYPE_CHECKING:
    # A batch can be held without the shard reader.
    from d2i.shards import ShardReader
    from d2i.train.data.text_source import OpenText


@dataclass(frozen=True)
class Batch:
    """Tensors of one micro batch of B samples.

    Args:
        keys: The samples' keys.
        image: (B, ...) the array of the family's codec, float16 as stored; moments (B, 8, h, w),
            unscaled, for Stable Diffusion's autoencoder.
        latent_noise: (B, C, h, w) standard normal, to draw latents from the moments.
        noise: (B, C, h, w) standard normal, to be predicted.
        draw: (B,) noise levels, as `Family.draw_levels` returns them.
        conditions: What the network is given beside the image, by name; `text` (B, 77 W, text_dim)
            float16 always, those of '' where the condition is dropped. See `Family.conditions`.
    """

    keys: tuple[str, ...]
    image: Tensor
    latent_noise: Tensor
    noise: Tensor
    draw: Tensor
    conditions: Mapping[str, Tensor]

    def to(self, device: torch.device) -> Batch:
        """Return the batch on another device, with all float16 tensors as float32.

        Shard data stays float16 until it is on the device: half the bytes to move, and no
        conversion in the reader threads.
        """
        return _mapped(self, lambda part: _widened(part.to(device, non_blocking=True)))

    def pinned(self) -> Batch:
        """Return the batch in pinned memory, for asynchronous copies to an accelerator.

        This is the only copy after reading: until then the tensors share the reader's arrays.
        """
        return _mapped(self, lambda part: part.pin_memory())


def _widened(part: Tensor) -> Tensor:
    return part.float() if part.dtype == torch.float16 else part


def _mapped(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    def changed(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: change(part) for name, part in value.items()}
        return change(value) if isinstance(value, Tensor) else value

    return replace(batch, **{f.name: changed(getattr(batch, f.name)) for f in fields(batch)})


class BatchLoader:
    """Prefetches micro batches in its own reader threads.

    Args:
        reader: The shards.
        config: The seed, the condition dropout, and the number of threads.
        family: The network's family, which names the arrays that it reads and adds conditions.
        open_text: Opens the text of the shards.
    """

    def __init__(
        self,
        reader: ShardReader,
        config: TrainConfig,
        family: Family,
        open_text: OpenText,
    ) -> None:
        self._reader = reader
        self._config = config
        self._family = family
        self._text = open_text(reader)
        self._threads = ThreadPoolExecutor(config.num_reader_threads, "batch-reader")
        self._waiting: deque[tuple[int, Future[Batch]]] = deque()

    def read_ahead(self, requests: Iterable[tuple[NDArray[np.int64], int]]) -> Iterator[Batch]:
        """Prefetch a micro batch for each (sample indices, step); yield them in that order.

        With offloaded text encoders each is read when it is asked for.
        """
        waiting = self._waiting
        if self._config.text_encoder_memory == "offload":
            # The encoders are on the accelerator only while no step is.
            yield from (self._read_pinned(indices, step) for indices, step in requests)
            return
        for indices, step in requests:
            waiting.append((step, self._threads.submit(self._read_pinned, indices, step)))
            if len(waiting) > self._config.num_reader_threads:
                yield waiting.popleft()[1].result()
        while waiting:
            yield waiting.popleft()[1].result()

    def first_unread(self, step: int) -> int:
        """Return the step of the first requested micro batch that is not read yet.

        If all are read, this is the step of the last one requested.

        Args:
            step: The current step, returned at least.
        """
        for requested, batch in self._waiting:
            step = max(step, requested)
            if not batch.done():
                break
        return step

    def _read_pinned(self, indices: NDArray[np.int64], step: int) -> Batch:
        batch = self.read(indices, step)
        return batch.pinned() if torch.cuda.is_available() else batch

    def read(self, indices: NDArray[np.int64], step: int, purpose: str = "") -> Batch:
        """Read a micro batch and draw its random numbers.

        Args:
            indices: Sample numbers, int64 (B,).
            step: The step that the draws belong to.
            purpose: Purpose of the draws; empty for training, which alone drops conditions.
        """
        members = [name for name in self._family.encoders if name != "text"]
        arrays: dict[str, NDArray[Any]] = self._reader.read(indices, members=members)
        all_keys = self._reader.keys
        keys = tuple(all_keys[number] for number in indices.tolist())
        draws = BatchDraws(self._config.seed, keys, step, purpose)
        text = self._text.read(indices)
        if not purpose:
            self._drop_conditions(text, draws)
        image = arrays[self._family.codec.array]
        shape = self._family.codec.latent_shape(image.shape[-1])
        if self._family.reads_sizes:
            arrays["sizes"] = self._sizes(indices)
        conditions = self._family.conditions(arrays | text, draws)
        return Batch(
            keys=keys,
            image=_tensor(image),
            latent_noise=_tensor(draws.normal("latent", shape)),
            noise=_tensor(draws.normal("noise", shape)),
            draw=_tensor(self._family.draw_levels(draws, self._config)),
            conditions={name: _tensor(array) for name, array in conditions.items()},
        )

    def _sizes(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return height and width of each image before it was cut to a square, in pixels."""
        sources = [self._reader.read_json(int(index)).get("source", {}) for index in indices]
        sizes = [[source.get("height", 0), source.get("width", 0)] for source in sources]
        return np.array(sizes, np.float32)

    def close(self) -> None:
        """Stop the reader threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _drop_conditions(self, text: Mapping[str, NDArray[Any]], draws: BatchDraws) -> None:
        dropped = draws.uniform("drop") < self._config.condition_dropout
        for name, empty in self._text.empty.items():
            # Texts that differ in length are filled up to the longest, at least that of ''.
            text[name][dropped] = 0
            text[name][dropped, : len(empty)] = empty


def _tensor(array: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
