"""Checks that one node of a cluster runs on itself, against what the driver expects.

Must not import ray.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import d2i
from d2i.doctor.check import Check, first_line, run_checks
from d2i.errors import D2IError
from d2i.io import storage

# Packages that decide the bytes of shards and images, or must match for processes to communicate.
_DECISIVE = ("d2i", "ray", "torch", "torchvision", "diffusers", "transformers", "numpy", "pillow")
_OTHERS = ("deepspeed", "img2dataset", "open_clip_torch", "pyarrow", "tokenizers", "fsspec", "s3fs")

_GIB = 2**30
# Ray stops writing to a disk that is this full.
_FULL_DISK = 0.95
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(/[\w-][\w.-]*)?")
_WEIGHTS_SUFFIXES = frozenset({".bin", ".ckpt", ".pt", ".pth", ".safetensors"})
# Settings that name a file or a directory, never a repository of the hub.
_LOCAL_SETTINGS = frozenset({"encoders.text_prefix", "metrics.extractor_weights"})


@dataclass(frozen=True)
class Probe:
    """Directory that every node must read and write, with a file that the driver left there.

    Args:
        url: URL of the directory.
        name: Name of the file; None if the driver itself could not write.
        content: Content of the file.
    """

    url: str
    name: str | None
    content: bytes


@dataclass(frozen=True)
class Question:
    """Requirements on a node; picklable.

    Args:
        versions: The driver's, from `installed_versions`.
        weights: (setting, value) of everything that a recipe names as weights.
        probes: The directories.
    """

    versions: dict[str, str]
    weights: tuple[tuple[str, str], ...]
    probes: tuple[Probe, ...]


def inspect_node(question: Question, num_gpus: float, node_id: str) -> list[Check]:
    """Check the node this runs on: versions, accelerators, weights, storage, disk.

    Args:
        question: Requirements of the driver.
        num_gpus: Number of accelerators that Ray counts here.
        node_id: Unique name of this node for its file in each directory.

    Returns:
        One row per check; nothing is raised.
    """
    checks: list[tuple[str, Callable[[], Check]]] = [
        ("versions", partial(check_versions, question.versions)),
        ("accelerators", partial(check_accelerators, num_gpus)),
        *((f"weights {n}", partial(check_weights, n, value)) for n, value in question.weights),
        *((f"storage {p.url}", partial(check_storage, p, node_id)) for p in question.probes),
        ("disk", check_disk),
    ]
    return list(run_checks(checks))


def installed_versions() -> dict[str, str]:
    """Return the versions of the installed packages, d2i's with a hash of its code."""
    found = {"python": platform.python_version()}
    for name in (*_DECISIVE, *_OTHERS):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | {"d2i": f"{d2i.__version__} (code {_code_hash()})"}


def check_versions(expected: dict[str, str]) -> Check:
    """Compare the installed versions with the driver's: packages that decide bytes must match."""
    found = installed_versions()
    differing = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    if not differing:
        return Check("versions", "ok", f"same as the driver's: {len(found)} packages")
    detail = ", ".join(
        f"{name} {found.get(name, 'absent')}, the driver has {expected.get(name, 'none')}"
        for name in differing
    )
    is_decisive = any(_is_decisive(expected.get(n, ""), found.get(n, ""), n) for n in differing)
    fix = "use one container image, or one environment from constraints.txt, on all nodes"
    return Check("versions", "fail" if is_decisive else "warn", detail, fix)


def check_accelerators(num_gpus: float) -> Check:
    """Check that torch computes on as many accelerators as Ray counts here."""
    name = "accelerators"
    if not num_gpus:
        return Check(name, "ok", "none; this node fetches, or computes on CPU cores")
    # Ray hides them from a process that reserves none.
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < num_gpus:
        detail = f"Ray counts {num_gpus:g}, torch (CUDA {torch.version.cuda}) computes on {found}"
        return Check(name, "fail", detail, "update the driver, or give the container its devices")
    torch.ones(1, device="cuda").add(1).cpu()
    size = torch.cuda.get_device_properties(0).total_memory
    detail = f"{found} x {torch.cuda.get_device_name(0)}, {size / _GIB:.0f} GiB"
    return Check(name, "ok", detail)


def check_weights(setting: str, value: str) -> Check:
    """Check that the weights of a setting are here: shipped, a path, or in the hub's cache."""
    from d2i.weights_resolve import resolve_weights

    name = f"weights {setting}"
    try:
        path = Path(resolve_weights(value))
    except D2IError as err:
        return Check(name, "fail", first_line(err), "install the same d2i on all nodes")
    except OSError as err:
        fix = "check the URL, and this node's permission to read there"
        return Check(name, "fail", f"{value} cannot be read: {first_line(err)}", fix)
    if path.exists():
        return Check(name, "ok", f"{value}, {_size_bytes(path) / 2**20:.1f} MiB")
    if setting in _LOCAL_SETTINGS or not _is_hub_name(value):
        fix = "copy it to every node, or put it on a shared file system"
        return Check(name, "fail", f"{value} is not on this node", fix)
    if _is_in_hub_cache(value):
        return Check(name, "ok", f"{value}, in the hub's cache")
    fix = "'d2i weights fetch' on every node, or once with HF_HOME as a shared directory"
    if is_offline():
        return Check(
            name, "fail", f"{value} is not in the hub's cache, and HF_HUB_OFFLINE is set", fix
        )
    return Check(name, "warn", f"{value} is not in the hub's cache: it will be downloaded", fix)


def is_offline() -> bool:
    """Return whether the environment forbids downloads of weights."""
    return os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")


def check_storage(probe: Probe, node_id: str) -> Check:
    """Check that the driver's file can be read in a directory, and the node's own written."""
    name = f"storage {probe.url}"
    own = storage.join(probe.url, f"d2i-probe-{node_id}")
    fix = "mount the same storage on every node, with permission to read and write there"
    try:
        if probe.name and storage.read_bytes(storage.join(probe.url, probe.name)) != probe.content:
            return Check(name, "fail", "the file there is not the driver's", fix)
    except FileNotFoundError:
        return Check(name, "fail", "the driver's file is not there: this is other storage", fix)
    except (OSError, D2IError) as err:
        return Check(name, "fail", f"cannot be read: {first_line(err)}", fix)
    try:
        storage.write_bytes(own, probe.content)
        is_whole = storage.read_bytes(own) == probe.content
        storage.remove(own)
    except (OSError, D2IError) as err:
        return Check(name, "fail", f"cannot be written: {first_line(err)}", fix)
    if not is_whole:
        return Check(name, "fail", "read other bytes than were written", fix)
    return Check(name, "ok", "read, written and removed a file")


def check_disk(directory: Path | None = None) -> Check:
    """Check the free space where Ray spills objects and files are prepared."""
    directory = directory or Path(tempfile.gettempdir())
    usage = shutil.disk_usage(directory)
    detail = f"{usage.free / _GIB:.1f} GiB free in {directory}"
    if usage.used > _FULL_DISK * usage.total:
        return Check(
            "disk", "fail", f"{detail}, over 95 % full: Ray stops spilling", "free disk space"
        )
    if usage.free < 20 * _GIB:
        return Check("disk", "warn", detail, "little for spilled objects: free disk space")
    return Check("disk", "ok", detail)


def _is_decisive(expected: str, found: str, name: str) -> bool:
    """Return whether a difference is more than one of builds (`2.14.1+cpu` beside `2.14.1`)."""
    if name == "python":
        return expected.split(".")[:2] != found.split(".")[:2]
    return name in _DECISIVE and expected.partition("+")[0] != found.partition("+")[0]


@cache
def _code_hash() -> str:
    """Return 8 digits of the sha256 of d2i's code: a version alone does not identify a checkout."""
    digest = hashlib.sha256()
    root = Path(d2i.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def _size_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in _files(path))


def _files(path: Path) -> Iterator[Path]:
    yield from (file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _is_hub_name(value: str) -> bool:
    """Return whether a value names a repository, or a directory in one, rather than a file."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    if not _HUB_NAME.fullmatch(value) or Path(value).suffix in _WEIGHTS_SUFFIXES:
        return False
    try:
        validate_repo_id("/".join(value.split("/")[:2]))
    except HFValidationError:
        return False
    return True


def _is_in_hub_cache(value: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    owner, repository, *subfolder = value.split("/")
    # That of a whole pipeline has another name.
    names = ("/".join([*subfolder, name]) for name in ("config.json", "model_index.json"))
    found = (try_to_load_from_cache(f"{owner}/{repository}", name) for name in names)
    return any(isinstance(place, str) for place in found)
