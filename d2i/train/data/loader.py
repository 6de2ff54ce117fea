"""The shards of a run: their URLs, checks against network and cache, order and text encoder."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2i.config import EncodersConfig, TrainConfig
from d2i.encoders import ClipText, check_encoder_hashes
from d2i.errors import ConfigError, DataError
from d2i.io import storage
from d2i.shards import ShardReader
from d2i.train.data.batch import TextEncoder
from d2i.train.data.data_order import DataOrder


def check_sizes(network: Any, reader: ShardReader) -> None:
    """Check that the network's input sizes match the shards.

    Raises:
        ConfigError: Naming the size that differs and the setting to change.
        DataError: If there is no sample.
    """
    arrays = reader.manifest.arrays
    if not len(reader):
        raise DataError(
            f"{reader.url} has no samples; expected at least one; see its ledger and "
            "manifest.json for the reasons"
        )
    wanted = {"backbone.latent_size": (network.latent_size, arrays["moments"].shape[-1])}
    if "text" in arrays:
        num_tokens, text_dim = arrays["text"].shape
        wanted["backbone.text_dim"] = (network.text_dim, text_dim)
    else:
        num_tokens = arrays["tokens"].shape[0]
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


def build_text_encoder(
    reader: ShardReader, config: EncodersConfig, device: str
) -> TextEncoder | None:
    """Return the frozen text encoder for shards that hold only token ids; None for others.

    It returns the latents that the shards would hold: float16, at the fixed compute batch size.

    Raises:
        CheckpointError: If it cannot be loaded, or the data was prepared with another one.
    """
    if "text" in reader.manifest.arrays:
        return None
    clip_text = ClipText(config.clip_text, config.text_prefix, device)
    check_encoder_hashes({"clip_text": clip_text.hash}, reader.manifest, reader.url)

    def encode(tokens: NDArray[np.uint16]) -> NDArray[np.float16]:
        return clip_text.encode(tokens, config.compute_batch_size).astype(np.float16)

    return encode
