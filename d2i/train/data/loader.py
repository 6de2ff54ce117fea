"""The data of a run: its batches in order, and checks against network and cache."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2i.config import Recipe, TrainConfig
from d2i.encoders.data_fingerprint import ENCODER_OF_ARRAY, encoder_of
from d2i.errors import ConfigError, DataError
from d2i.io import storage
from d2i.models.image_codec import find_codec
from d2i.models.registry import family_of_backbone
from d2i.shards import ShardReader
from d2i.train.data.batch import Batch, BatchLoader
from d2i.train.data.data_order import DataOrder
from d2i.train.data.text_source import TextSource
from d2i.train.distributed.ranks import Ranks


def check_arrays(recipe: Recipe, reader: ShardReader) -> None:
    """Check that shards hold the arrays that a recipe's network is trained on.

    Raises:
        ConfigError: If one is missing, or of another kind or encoder; only format 2 can hold such.
        DataError: If there is no sample.
    """
    if not len(reader):
        raise DataError(
            f"{reader.url} has no samples; expected at least one; see its ledger and "
            "manifest.json for the reasons"
        )
    _check_latents(recipe, reader)
    arrays, family = reader.manifest.arrays, family_of_backbone(recipe.backbone.name)
    wanted = {name: "float16" for name in family.encoders if name != "text"}
    if recipe.text.encode == "stored":
        wanted |= {"text": "float16"} if "text" in arrays else {"tokens": "uint16"}
    for name, dtype in wanted.items():
        found = arrays.get(name)
        if found is None or found.dtype != dtype:
            instead = "" if name != "tokens" else ", or use --set text.encode=on_the_fly"
            raise ConfigError(
                f"{reader.url}: got {found.dtype if found else 'no'} {name}; expected {dtype} "
                f"{name}, which {recipe.backbone.name} is trained on; prepare the data again with "
                f"its recipe{instead}"
            )
        if (made_by := encoder_of(name, found)) != ENCODER_OF_ARRAY[name]:
            raise ConfigError(
                f"{reader.url}: got {name} of the encoder {made_by!r}; expected "
                f"{ENCODER_OF_ARRAY[name]!r}; prepare the data again with d2i preprocess"
            )


def _check_latents(recipe: Recipe, reader: ShardReader) -> None:
    """Refuse latents of another codec than the network's, by the names of both."""
    shapes = {name: array.shape for name, array in reader.manifest.arrays.items()}
    found, expected = find_codec(shapes), family_of_backbone(recipe.backbone.name).codec
    if found != expected:
        latents = f"latents of {found.name}" if found else "no latents of a known codec"
        raise ConfigError(
            f"{reader.url}: got {latents}, in arrays {shapes}; expected {expected.array} of "
            f"{expected.name}, on which {recipe.backbone.name} is trained; prepare the data again "
            "with another --set encoders.vae"
        )


def check_sizes(network: Any, reader: ShardReader, text: TextSource) -> None:
    """Check that the network's input sizes match the shards and their text.

    Raises:
        ConfigError: Naming the size that differs and the setting to change.
    """
    arrays = reader.manifest.arrays
    codec = find_codec({name: array.shape for name, array in arrays.items()})
    array = arrays[codec.array if codec else "moments"]
    wanted = {"backbone.latent_size": (network.latent_size, array.shape[-1])}
    num_tokens, text_dim = text.empty["text"].shape
    wanted["backbone.text_dim"] = (network.text_dim, text_dim)
    if network.num_text_tokens is not None:
        wanted["backbone.num_text_tokens"] = (network.num_text_tokens, num_tokens)
    for setting, (network_size, data_size) in wanted.items():
        if network_size != data_size:
            raise ConfigError(
                f"the network has {setting}={network_size}, the shards {data_size}; expected "
                f"the same; use --set {setting}={data_size}, or prepare the data again"
            )


def build_order(reader: ShardReader, config: TrainConfig) -> DataOrder:
    """Return the order in which a run reads the samples of its shards."""
    sizes = tuple(shard.num_samples for shard in reader.manifest.shards)
    return DataOrder(sizes, config.seed, config.order, config.num_window_shards)


class BatchStream:
    """The micro batches of one rank, step by step, read ahead.

    Args:
        reader: The training shards.
        batches: Reads a micro batch and draws its random numbers.
        config: Batch sizes, order and seed.
        ranks: All ranks, which share each global batch.
        run_url: The run directory, which receives the keys of each batch if `record_keys` is set.
    """

    def __init__(
        self,
        reader: ShardReader,
        batches: BatchLoader,
        config: TrainConfig,
        ranks: Ranks,
        run_url: str,
    ) -> None:
        self._reader, self._loader, self._config = reader, batches, config
        self._ranks, self._run_url = ranks, run_url
        self._order = build_order(reader, config)
        _, self.num_micro_batches = config.accumulation(ranks.world_size)
        self._batches: Iterator[tuple[int, Batch]] = iter(())

    def begin(self, step: int) -> None:
        """Begin to read the batches of a step and of those after it."""
        steps = np.repeat(np.arange(step, self._config.num_steps), self.num_micro_batches)
        batches = self._loader.read_ahead(self._requests(step))
        self._batches = zip(steps.tolist(), batches, strict=True)

    def __next__(self) -> Batch:
        """Return the next micro batch."""
        step, batch = next(self._batches)
        if self._config.record_keys:
            record_keys(self._run_url, self._ranks.rank, step + 1, batch.keys)
        return batch

    def prefetch_shards(self, step: int) -> None:
        """Fetch the shards that are read next, after those whose batches are read ahead."""
        # Counts from the first unread batch: shards of batches read ahead may be evicted already.
        unread = self._loader.first_unread(step)
        self._reader.prefetch(self._order.shards_ahead(unread, self._config.global_batch_size))

    def keys(self, step: int, rank: int, micro_batch: int) -> list[str]:
        """Return the keys of a rank's micro batch."""
        indices = self._micro_batches(step, rank)[micro_batch]
        return [self._reader.keys[int(index)] for index in indices]

    def close(self) -> None:
        """Stop reading ahead."""
        self._loader.close()

    def _requests(self, first_step: int) -> Iterator[tuple[NDArray[np.int64], int]]:
        for step in range(first_step, self._config.num_steps):
            for indices in self._micro_batches(step, self._ranks.rank):
                yield indices, step

    def _micro_batches(self, step: int, rank: int) -> list[NDArray[np.int64]]:
        size, world_size = self._config.global_batch_size, self._ranks.world_size
        return self._order.micro_batches(step, size, rank, world_size, self.num_micro_batches)


def record_keys(run_url: str, rank: int, step: int, keys: Sequence[str]) -> None:
    """Append the keys of a rank's micro batch to `keys/rank-N.jsonl`."""
    line = json.dumps({"step": step, "keys": list(keys)}) + "\n"
    storage.append_bytes(storage.join(run_url, "keys", f"rank-{rank}.jsonl"), line.encode())


def check_cache(
    reader: ShardReader, valid: ShardReader | None, config: TrainConfig, cache_gb: float | None
) -> None:
    """Check that the cache can hold all shards that a run reads at once; local data needs none.

    These are the shards that the order reads at once, and one shard of the validation split.

    Raises:
        ConfigError: If it is too small: every batch would fetch evicted shards again.
    """
    if cache_gb is None or storage.local_path(reader.url) is not None:
        return
    sizes = [shard.tar.size_bytes for shard in reader.manifest.shards]
    valid_sizes = [shard.tar.size_bytes for shard in valid.manifest.shards] if valid else [0]
    needed = build_order(reader, config).num_window_bytes(sizes) + max(valid_sizes, default=0)
    if needed > cache_gb * 1e9:
        named = f"train.num_window_shards={config.num_window_shards}, " * (config.order != "global")
        beside = " with a validation shard" if valid else ""
        raise ConfigError(
            f"--cache-gb {cache_gb:g} is too small: train.order={config.order} ({named}"
            f"{reader.url}) reads {needed / 1e9:.3g} GB at once{beside}; expected at least "
            "that, or twice that to prefetch; raise --cache-gb, or use --set "
            "train.order=blocked with fewer train.num_window_shards"
        )
