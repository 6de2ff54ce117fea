"""Functions shared by all encoders: load a pretrained module, hash it, run it at a fixed batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from d2i.config import Precision
from d2i.errors import CheckpointError
from d2i.io import checksums
from d2i.models.weights.load import update_state_hash
from d2i.weights_resolve import resolve_weights

_IMPORT_AGAIN = "copy it again from its source, or repeat d2i weights import"


def load_pretrained(model_class: Any, name: str, **options: Any) -> Any:
    """Load a diffusers or transformers model for inference in float32.

    Args:
        model_class: A class with `from_pretrained`.
        name: A shipped name, a directory, a hub repository, or `owner/repository/subfolder`.
        **options: Further arguments of its `from_pretrained`.

    Raises:
        CheckpointError: If there is nothing to load, or weights are missing: the libraries would
            fill them with random numbers and only log it.
    """
    where, subfolder = _place(name)
    check_sibling_checksums(Path(where))
    try:
        module, found = model_class.from_pretrained(
            where,
            subfolder=subfolder,
            torch_dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as err:
        raise _cannot_load(model_class, name, err) from err
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(
            f"{name}: {len(missing)} weights of {model_class.__name__} are missing, such as "
            f"{missing[0]}; expected all of them; {_IMPORT_AGAIN}"
        )
    return freeze(module)


def read_pretrained_config(model_class: Any, name: str) -> dict[str, Any]:
    """Read the `config.json` of a diffusers model, which names its class (`_class_name`).

    Args:
        model_class: A class with `load_config`, which an error names.
        name: As in `load_pretrained`.

    Raises:
        CheckpointError: If it cannot be read.
    """
    where, subfolder = _place(name)
    try:
        config: dict[str, Any] = model_class.load_config(where, subfolder=subfolder)
    except (OSError, ValueError) as err:
        raise _cannot_load(model_class, name, err) from err
    return config


def pretrained_bytes(model_class: Any, name: str, dtype: torch.dtype = torch.float32) -> int:
    """Return the bytes of a model of transformers as `load_pretrained` loads it, unloaded.

    Args:
        model_class: A class of transformers.
        name: As in `load_pretrained`.
        dtype: Of its weights.

    Raises:
        CheckpointError: If its `config.json` cannot be read.
    """
    where, subfolder = _place(name)
    try:
        config = model_class.config_class.from_pretrained(where, subfolder=subfolder)
        with torch.device("meta"):
            return module_bytes(_built_in(dtype, model_class, config))
    except (OSError, ValueError, RuntimeError, KeyError) as err:
        raise _cannot_load(model_class, name, err) from err


def _place(name: str) -> tuple[str, str]:
    """Return the directory or hub repository of a name, and the subfolder in it."""
    where = resolve_weights(name)
    if not Path(where).exists() and where.count("/") == 2:
        where, _, subfolder = where.rpartition("/")
        return where, subfolder
    return where, ""


def _cannot_load(model_class: Any, name: str, err: Exception) -> CheckpointError:
    reason = str(err).strip().splitlines()[0][:200]
    return CheckpointError(
        f"{name}: cannot load {model_class.__name__}: {reason}; expected a directory made by "
        "save_pretrained or a hub repository; give a local one with --set encoders.…=PATH"
    )


def check_sibling_checksums(place: Path) -> None:
    """Compare a file, or each file of a directory, with the sha256 beside it, if there is one.

    Raises:
        CheckpointError: If one differs.
    """
    files = [place] if place.is_file() else sorted(place.glob("*")) if place.is_dir() else []
    for file in map(str, files):
        checksums.check_if_summed(file, next_step=_IMPORT_AGAIN, error=CheckpointError)


def freeze(module: nn.Module) -> nn.Module:
    """Return the module in evaluation mode, without gradients."""
    return module.eval().requires_grad_(False)


def module_bytes(module: nn.Module) -> int:
    """Return the bytes of a module: its parameters and buffers, each tensor once."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.element_size() * tensor.numel() for tensor in tensors)


def _built_in(dtype: torch.dtype, model_class: Any, config: Any) -> nn.Module:
    """Build a model in a dtype; some buffers, such as rotary frequencies, stay in float32."""
    config.dtype = dtype
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        built: nn.Module = model_class(config)
    finally:
        torch.set_default_dtype(default)
    return built


def weights_hash(module: nn.Module) -> str:
    """Return the sha256 of a module's state: names, dtypes, shapes and bytes, in name order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        update_state_hash(digest, name, tensor)
    return digest.hexdigest()


_LOWER = {"bf16": torch.bfloat16, "fp16": torch.float16}


def matmul_precision(precision: Precision, device: str) -> AbstractContextManager[Any]:
    """Return an autocast context that multiplies in a precision; `fp32` changes nothing."""
    # No cache: autocast cannot cache weights that are inference tensors.
    return torch.autocast(
        torch.device(device).type,
        _LOWER.get(precision),
        enabled=precision in _LOWER,
        cache_enabled=False,
    )


def run_padded(
    network: Callable[[Tensor], Tensor],
    inputs: NDArray[Any],
    batch_size: int,
    device: str,
    precision: Precision = "fp32",
) -> NDArray[np.float32]:
    """Run a network over rows in fixed-size batches; the last is padded with its first row.

    Args:
        network: Takes (batch_size, ...) and returns (batch_size, ...).
        inputs: (N, ...), N >= 1.
        batch_size: Rows per call.
        device: The device of the network.
        precision: The precision of its multiplications.

    Returns:
        float32 (N, ...), in the order of `inputs`.
    """
    with matmul_precision(precision, device):
        outputs = [
            network(torch.from_numpy(batch).to(device))[:count].float().cpu().numpy()
            for batch, count in padded_batches(inputs, batch_size)
        ]
    return np.concatenate(outputs)


def padded_batches(inputs: NDArray[Any], batch_size: int) -> Iterator[tuple[NDArray[Any], int]]:
    """Yield (batch of exactly `batch_size` rows, number of rows that are not padding)."""
    for start in range(0, len(inputs), batch_size):
        rows = inputs[start : start + batch_size]
        padding = np.repeat(rows[:1], batch_size - len(rows), axis=0)
        yield np.ascontiguousarray(np.concatenate([rows, padding])), len(rows)
