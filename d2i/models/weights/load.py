"""Reading and writing of network weights: reads every published format, writes a safe one.

Reads safetensors, flat `.pth` state dicts and `{step}.ckpt/` directories, also in diffusers'
layout; writes safetensors, or a flat `.pth` for other programs. Pickled code is never run.
Imports no network class and no preset.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from d2i.errors import CheckpointError
from d2i.io import checksums
from d2i.models.weights.detect import detect_weights, published_names
from d2i.models.weights.pickle_guard import ZIP_MAGIC, check_torch_file

LFS_POINTER = b"version https://git-lfs"
WEB_PAGE = (b"<!doctype", b"<html")
TORCH_MAGICS = (ZIP_MAGIC, b"\x80")
DIRECTORY_FILES = (
    "model.safetensors",
    "nnet_ema.pth",
    "nnet.pth",
    "ema.safetensors",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
)
PARALLEL_PREFIX, COMPILED = "module.", "_orig_mod."
"""Prefixes that torch's wrappers add to a network's keys: DistributedDataParallel and compile."""
NUM_LISTED = 3
_FETCH_AGAIN = "copy it again from its source, or delete it and repeat the command that wrote it"


def load_weights(network: nn.Module, path: str | Path) -> nn.Module:
    """Load published weights into a network, all or none.

    A network built on the `meta` device gets its tensors from the file; any other keeps its
    device and dtype.

    Args:
        network: the network to load into, as `build_backbone` returns it.
        path: a `.safetensors` file, a flat `.pth` state dict, a model directory, or
            a `{step}.ckpt/` directory, where `nnet_ema.pth` is preferred. Keys may have the
            prefixes `module.` and `_orig_mod.`, or be those of diffusers' UniDiffuser.

    Returns:
        The same network.

    Raises:
        CheckpointError: the file cannot be read, or its keys or shapes do not match the network's.
    """
    return fill_network(network, read_published(path), path)


def fill_network(network: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> nn.Module:
    """Load tensors by name into a network, as `load_weights`; error messages name `path`.

    Raises:
        CheckpointError: their keys or shapes do not match the network's.
    """
    check_fits(network, state, path)
    check_numbers(state, path)
    on_meta = any(tensor.is_meta for tensor in network.state_dict().values())
    network.load_state_dict(state, assign=on_meta)
    return network


def check_fits(network: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Check that every key and shape matches a network's, and every tensor is dense floats.

    Raises:
        CheckpointError: some do not; the message lists them, and what the tensors look like.
    """
    problems = _mismatches(network.state_dict(), state)
    if problems:
        found = detect_weights(state)
        raise CheckpointError(
            f"{path} does not fit {type(network).__name__}: {'; '.join(problems)}; it "
            f"holds {found.words if found else 'weights of an unknown kind'}; build the network of "
            "these weights, with the same sizes"
        )


def check_numbers(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Check that all weights are finite: a single NaN makes every image black.

    Raises:
        CheckpointError: some are NaN or infinite; the message names the first tensor.
    """
    counts = {key: num_not_finite(tensor) for key, tensor in state.items()}
    if any(counts.values()):
        first = next(key for key, count in counts.items() if count)
        raise CheckpointError(
            f"{path} holds {sum(counts.values())} weights that are NaN or infinite, the first in "
            f"{first}; expected finite numbers: a single NaN makes every image black; download the "
            "file again, or use weights from before the training diverged"
        )


def num_not_finite(tensor: Tensor) -> int:
    """Count the NaN and infinite values of a tensor; 0 if it does not hold dense floats."""
    if not is_dense_floats(tensor):
        return 0
    # torch's isfinite does not take 8-bit floats.
    values = tensor.float() if tensor.element_size() == 1 else tensor
    return int((~torch.isfinite(values)).sum())


def update_state_hash(digest: Any, name: str, tensor: Tensor) -> None:
    """Add a tensor to the sha256 of a state: its name, dtype, shape and bytes."""
    array = tensor.detach().cpu().contiguous()
    digest.update(f"{name} {array.dtype} {tuple(array.shape)}\n".encode())
    digest.update(array.view(torch.uint8).numpy().tobytes() if array.ndim else bytes(array))


def read_published(path: str | Path) -> dict[str, Tensor]:
    """Read as `read_state_dict`, with keys of any other layout renamed to the published ones."""
    return dict(published_names(read_state_dict(path)))


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a file of tensors by name, on the CPU, without running any code in it.

    Args:
        path: as for `load_weights`.

    Returns:
        Tensors by key, without `module.` and `_orig_mod.`; memory-mapped if the format allows it.

    Raises:
        CheckpointError: missing, truncated, different from the sha256 beside it, a Git LFS pointer
            or a web page, not a state dict, or a pickle that holds more than tensors.
    """
    file = weights_file(path)
    head = _head(file)
    if head.startswith(LFS_POINTER):
        raise CheckpointError(
            f"{file} is a Git LFS pointer, not the weights; download the file itself (git lfs pull)"
        )
    if head.lstrip().lower().startswith(WEB_PAGE):
        raise CheckpointError(
            f"{file} is a web page, not the weights: the host asked for something (such as "
            "a login) instead of sending them; open its URL in a browser, and download "
            "the file itself"
        )
    checksums.check_file(str(file), next_step=_FETCH_AGAIN, error=CheckpointError)
    is_torch = head.startswith(TORCH_MAGICS) and head[8:9] != b"{"
    try:
        content = _read_torch(file) if is_torch else safetensors.torch.load_file(file)
    except CheckpointError:
        raise
    except Exception as error:
        # torch and safetensors raise a dozen classes for a corrupt file; the user needs one line.
        raise CheckpointError(_unreadable(file, error)) from error
    return _flat_tensors(file, content)


def read_described(path: str | Path) -> dict[str, str]:
    """Return the metadata of a safetensors file; empty for any other format."""
    file = weights_file(path)
    try:
        with safetensors.safe_open(file, "pt") as opened:
            return dict(opened.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return {}


def save_weights(
    network_or_state: nn.Module | Mapping[str, Tensor],
    path: str | Path,
    described: Mapping[str, str] | None = None,
) -> None:
    """Publish weights atomically as safetensors, under their published keys.

    Their sha256 is written beside them and checked when they are read.

    Args:
        network_or_state: a network, or tensors by key.
        path: the file to write, a path or a URL; its directory is created.
        described: further metadata of the file (see `read_described`).

    Raises:
        CheckpointError: the file cannot be written.
    """
    metadata = {"format": "pt"} | dict(described or {})
    if isinstance(network_or_state, nn.Module):
        metadata |= _describe(network_or_state)
        network_or_state = network_or_state.state_dict()
    tensors = {key: value.detach().cpu().contiguous() for key, value in network_or_state.items()}

    def write(file: Path) -> None:
        safetensors.torch.save_file(tensors, file, metadata)
        _sort_described(file)

    _write(path, write)


def _sort_described(file: Path) -> None:
    """Sort the metadata of a safetensors file: the library writes it in hash map order."""
    with file.open("r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        data = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        opened.seek(8)
        opened.write(data.ljust(length))


def save_torch(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Publish a flat `.pth` state dict, as the published programs read it; see `save_weights`.

    Raises:
        CheckpointError: the file cannot be written.
    """
    _write(path, lambda file: torch.save(dict(state), file))


def _write(path: str | Path, write: Callable[[Path], None]) -> None:
    try:
        with checksums.new_file(str(path)) as scratch:
            write(scratch)
    except (OSError, safetensors.SafetensorError, RuntimeError) as error:
        # torch and safetensors wrap the system's message.
        reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[0][:160]
        raise CheckpointError(f"cannot write {path}: {reason}; check the path") from error


def _describe(network: nn.Module) -> dict[str, str]:
    """Return the metadata that a reader of the file needs."""
    scale = getattr(network, "latent_scale", None)
    described = {"arch": type(network).__name__.lower(), "n_convention": "n in 1..1000"}
    return described if scale is None else described | {"latent_scale": repr(float(scale))}


def weights_file(path: str | Path) -> Path:
    """Return the file to read: the path itself, or the preferred file of a directory.

    Raises:
        CheckpointError: If a directory holds none.
    """
    path = Path(path)
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
    check_torch_file(file)
    is_zip = _head(file).startswith(ZIP_MAGIC)
    return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)


def _unreadable(file: Path, error: Exception) -> str:
    size_bytes = file.stat().st_size
    reason = str(error).strip().split("\n")[0][:160] or type(error).__name__
    return (
        f"cannot read weights {file} ({size_bytes} bytes): {reason}; the file is truncated or in "
        "another format; expected safetensors or a torch state dict; download it again"
    )


def _flat_tensors(file: Path, content: object) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not content:
        raise CheckpointError(
            f"{file} holds {type(content).__name__ if content else 'nothing'}, "
            "expected a flat state dict of tensors"
        )
    for key, value in content.items():
        if not isinstance(key, str) or not key.isprintable() or not _has_numbers(value):
            raise CheckpointError(
                f"{file} holds {_kind(value)} at {key!r:.100}; expected a flat state dict of "
                "tensors by name; save only the inner state dict and use that file"
            )
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for name, value in content.items():
        key = _unwrapped(name)
        if key in tensors:
            raise CheckpointError(
                f"{file} holds both {names[key]} and {name}; expected one network; save the one "
                "that you want and use that file"
            )
        tensors[key], names[key] = value, name
    return tensors


def _unwrapped(key: str) -> str:
    """Strip the prefixes of torch's wrappers from a key, however they are nested."""
    key = key.replace(COMPILED, "")
    while key.startswith(PARALLEL_PREFIX):
        key = key.removeprefix(PARALLEL_PREFIX)
    return key


def _has_numbers(value: object) -> bool:
    """Return whether a value is a tensor whose storage is large enough for all its elements."""
    if not isinstance(value, Tensor) or value.is_meta:
        return False
    return value.nbytes <= value.untyped_storage().nbytes()


def _kind(value: object) -> str:
    is_hollow = isinstance(value, Tensor) and not _has_numbers(value)
    return "a tensor without its numbers" if is_hollow else type(value).__name__


def _mismatches(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Return one phrase for each way in which keys, shapes or dtypes differ."""
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    misshaped = [
        f"{key} is {tuple(found[key].shape)}, expected {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in found and found[key].shape != tensor.shape
    ]
    not_floats = [
        f"{key} is {found[key].dtype}"
        for key in expected
        if key in found and not is_dense_floats(found[key])
    ]
    kinds = (
        ("missing", missing),
        ("unexpected", unexpected),
        ("mis-shaped", misshaped),
        ("not dense floats", not_floats),
    )
    return [f"{len(items)} {kind} ({_first_few(items)})" for kind, items in kinds if items]


def is_dense_floats(tensor: Tensor) -> bool:
    """Return whether a tensor is dense and floating-point, as all weights are."""
    return tensor.is_floating_point() and tensor.layout == torch.strided


def _first_few(items: list[str]) -> str:
    return ", ".join(items[:NUM_LISTED]) + (", ..." if len(items) > NUM_LISTED else "")
