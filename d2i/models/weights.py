"""Network weights in and out: every published file form in, one safe file form out.

Reads safetensors, flat `.pth` state dicts and `{step}.ckpt/` directories; writes safetensors.
Nothing is ever unpickled as code. Imports no network class and no preset.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from d2i import storage
from d2i.errors import CheckpointError

LFS_POINTER = b"version https://git-lfs"
ZIP_MAGIC = b"PK\x03\x04"
TORCH_MAGICS = (ZIP_MAGIC, b"\x80")
DIRECTORY_FILES = ("model.safetensors", "nnet_ema.pth", "nnet.pth", "ema.safetensors")
PARALLEL_PREFIX = "module."
NUM_LISTED = 3


def load_weights(network: nn.Module, path: str | Path) -> nn.Module:
    """Load published weights into a network; all of them, or none.

    A network built on the `meta` device gets its tensors from the file; any other keeps its
    device and dtype.

    Args:
        network: the network to fill, as `build_backbone` returns it.
        path: a `.safetensors` file, a flat `.pth` state dict, or a `{step}.ckpt/` directory,
            of which `nnet_ema.pth` is preferred. Keys may carry the prefix `module.`.

    Returns:
        The same network.

    Raises:
        CheckpointError: the file cannot be read, or its keys or shapes are not the network's.
    """
    state = read_state_dict(path)
    expected = network.state_dict()
    problems = _mismatches(expected, state)
    if problems:
        raise CheckpointError(
            f"{path} does not fit {type(network).__name__}: {'; '.join(problems)}; "
            "build the network of these weights, with the same sizes"
        )
    on_meta = any(tensor.is_meta for tensor in expected.values())
    network.load_state_dict(state, assign=on_meta)
    return network


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a file of tensors by name, on the CPU, without running any code of it.

    Args:
        path: as for `load_weights`.

    Returns:
        Tensors by key, without the prefix `module.`; memory-mapped where the form allows it.

    Raises:
        CheckpointError: missing, truncated, a Git LFS pointer, not a state dict, or a pickle
            that holds more than tensors.
    """
    file = _weights_file(Path(path))
    head = _head(file)
    if head.startswith(LFS_POINTER):
        raise CheckpointError(
            f"{file} is a Git LFS pointer, not the weights; fetch the file itself (git lfs pull)"
        )
    is_torch = head.startswith(TORCH_MAGICS) and head[8:9] != b"{"
    try:
        content = _read_torch(file) if is_torch else safetensors.torch.load_file(file)
    except Exception as error:
        # torch and safetensors raise a dozen classes for a broken file; the user needs one line.
        raise CheckpointError(_unreadable(file, error)) from error
    return _flat_tensors(file, content)


def save_weights(network_or_state: nn.Module | Mapping[str, Tensor], path: str | Path) -> None:
    """Write weights as safetensors under their published keys; complete, or not at all.

    Args:
        network_or_state: a network, or tensors by key.
        path: the file to write; its directory is made.

    Raises:
        CheckpointError: the file cannot be written.
    """
    metadata = {"format": "pt"}
    if isinstance(network_or_state, nn.Module):
        metadata |= _describe(network_or_state)
        network_or_state = network_or_state.state_dict()
    tensors = {key: value.detach().cpu().contiguous() for key, value in network_or_state.items()}
    target = Path(path)
    try:
        storage.write_bytes(str(target), safetensors.torch.save(tensors, metadata))
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror}; check the path") from error


def _describe(network: nn.Module) -> dict[str, str]:
    """What a reader of the file must know beside the tensors."""
    scale = getattr(network, "latent_scale", None)
    described = {"arch": type(network).__name__.lower(), "n_convention": "n in 1..1000"}
    return described if scale is None else described | {"latent_scale": repr(float(scale))}


def _weights_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in DIRECTORY_FILES:
        if (path / name).is_file():
            return path / name
    raise CheckpointError(
        f"{path} holds no weights: expected one of {', '.join(DIRECTORY_FILES)} in it"
    )


def _head(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(len(LFS_POINTER))
    except OSError as error:
        raise CheckpointError(
            f"cannot read weights {file}: {error.strerror}; check the path"
        ) from error


def _read_torch(file: Path) -> object:
    is_zip = _head(file).startswith(ZIP_MAGIC)
    return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)


def _unreadable(file: Path, error: Exception) -> str:
    size_bytes = file.stat().st_size
    if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error).lower():
        return (
            f"{file} is a pickle that holds more than tensors, which d2i never runs; "
            "save its state dict alone and use that file"
        )
    reason = str(error).strip().split("\n")[0][:160] or type(error).__name__
    return (
        f"cannot read weights {file} ({size_bytes} bytes): {reason}; the file is truncated or of "
        "another form, expected safetensors or a torch state dict; fetch it again"
    )


def _flat_tensors(file: Path, content: object) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not content:
        raise CheckpointError(
            f"{file} holds {type(content).__name__ if content else 'nothing'}, "
            "expected a flat state dict of tensors"
        )
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{file} holds {type(value).__name__} at {key!r}, expected a flat state dict of "
                "tensors; save the inner state dict alone and use that file"
            )
        if not value.is_floating_point() or value.layout != torch.strided:
            raise CheckpointError(
                f"{file} holds {value.dtype} ({value.layout}) at {key!r}, expected dense floats"
            )
    return {key.removeprefix(PARALLEL_PREFIX): value for key, value in content.items()}


def _mismatches(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """One phrase for each way in which the keys or shapes differ."""
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    misshaped = [
        f"{key} is {tuple(found[key].shape)}, expected {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in found and found[key].shape != tensor.shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped))
    return [f"{len(items)} {kind} ({_first_few(items)})" for kind, items in kinds if items]


def _first_few(items: list[str]) -> str:
    return ", ".join(items[:NUM_LISTED]) + (", ..." if len(items) > NUM_LISTED else "")
