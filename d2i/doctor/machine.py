"""Checks of what this environment can and cannot run: one row per fact, each with its fix.

Owns the checks; the command line prints them. Every check imports what it needs when it runs, and a
check that crashes becomes a `fail` row. Ray is started in its own process, so that a start-up that
hangs can be killed. Only the command line may import it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

from d2i.doctor.check import REINSTALL, Check, first_line, run_checks
from d2i.errors import D2IError
from d2i.io.checksums import file_sha256

_GIB = 2**30

_RAY_TIMEOUT_S = 120.0
_RAY_PROGRAM = """
import ray
ray.init(
    address="local", num_cpus=1, include_dashboard=False, log_to_driver=False,
    object_store_memory=80 * 2**20, logging_level="ERROR",
)
assert ray.get(ray.remote(lambda: 6 * 7).remote()) == 42
ray.shutdown()
"""

# File published by torch-fidelity; its name ends in the first digits of its sha256.
_INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{_INCEPTION}"


def checks() -> Iterator[Check]:
    """Check the environment, one row at a time; a row is computed when it is consumed.

    Yields:
        One `Check` per part of the environment, in a fixed order. Nothing is raised: a check that
            crashes is a `fail` row with the reason.
    """
    return run_checks(_CHECKS)


def check_python() -> Check:
    """Check for Python 3.11 or 3.12: img2dataset needs a module that 3.13 removed."""
    found = platform.python_version()
    if (3, 11) <= sys.version_info[:2] < (3, 13):
        return Check("Python", "ok", found)
    return Check("Python", "fail", f"{found}; expected 3.11 or 3.12", "make clean, then make setup")


def check_torch() -> Check:
    """Check that torch and torchvision are one build, by calling an operator of the pair."""
    pair = f"torch {version('torch')}, torchvision {version('torchvision')}"
    fix = f"install the pair that constraints.txt names: {REINSTALL}"
    try:
        import torch
        from torchvision.ops import nms

        box = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
        kept = nms(box, torch.ones(1), 0.5).tolist()
    except (ImportError, RuntimeError, OSError) as err:
        return Check("torch", "fail", f"{pair} do not match: {first_line(err)}", fix)
    if kept != [0]:
        return Check("torch", "fail", f"{pair}: nms of one box gave {kept}, expected [0]", fix)
    return Check("torch", "ok", f"{pair}, one build")


def check_gpu() -> Check:
    """Check for GPUs that torch can compute on, or give the reason why there are none."""
    import torch

    if torch.cuda.is_available():
        torch.ones(1, device="cuda").add(1).cpu()
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        size = torch.cuda.get_device_properties(0).total_memory
        return Check("GPU", "ok", f"{len(names)} x {names[0]}, {size / _GIB:.0f} GiB")
    if Path("/dev/nvidiactl").exists():
        detail = f"an NVIDIA driver is installed, but torch (CUDA {torch.version.cuda}) sees no GPU"
        return Check("GPU", "warn", detail, "update the driver, or install torch for its CUDA")
    fix = "none needed for the demo; the paper's recipes need NVIDIA GPUs"
    return Check("GPU", "warn", "none: everything runs on the CPU", fix)


def check_deepspeed(search_path: str | None = None) -> Check:
    """Check that DeepSpeed can compile operators of its own: compiler, headers, ninja.

    d2i uses none of them, so their absence stops nothing here.

    Args:
        search_path: Directories to search for programs, as in PATH; by default this interpreter's
            own directory, then PATH.
    """
    name = "DeepSpeed"
    path = search_path or os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    )
    wanted = os.environ.get("CXX", "c++")  # the one that torch's extension builder calls
    compiler = shutil.which(wanted, path=path)
    if compiler is None:
        fix = "install a C++ compiler (Debian, Ubuntu: apt-get install g++)"
        return Check(name, "warn", f"no C++ compiler: {wanted} is not on PATH", fix)
    if shutil.which("ninja", path=path) is None:
        return Check(name, "warn", "ninja is not on PATH", "pip install ninja")
    problem = _compile_problem(compiler, path)
    if problem:
        fix = "install the headers (Debian, Ubuntu: apt-get install g++ python3-dev)"
        return Check(name, "warn", f"{wanted} cannot compile a Python extension: {problem}", fix)
    return Check(name, "ok", f"{version('deepspeed')}; {wanted} and ninja can build its operators")


def check_ray(timeout_s: float = _RAY_TIMEOUT_S, program: str = _RAY_PROGRAM) -> Check:
    """Check that Ray starts on this machine and runs a task, in a process that is killed after it.

    Args:
        timeout_s: After this long, the process and all it started are killed.
        program: Python program to run.
    """
    fix = "make the temporary directory and shared memory writable, and allow loopback connections"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
    )
    try:
        _, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return Check("Ray", "fail", f"did not start within {timeout_s:.0f} s", fix)
    finally:
        _end_group(process)
    if process.returncode:
        last = (errors.strip().splitlines() or ["no message"])[-1]
        return Check("Ray", "fail", f"did not start: {last}", fix)
    return Check("Ray", "ok", f"{version('ray')} started and ran a task")


def check_disk(directory: Path | None = None) -> Check:
    """Check the free space of the current directory; the demo needs less than 2 GiB."""
    free = shutil.disk_usage(directory or Path.cwd()).free
    detail = f"{free / _GIB:.1f} GiB free in the current directory"
    if free < 2 * _GIB:
        return Check("disk", "fail", detail, "free 2 GiB for the demo, or give it another --out")
    if free < 20 * _GIB:
        return Check("disk", "warn", detail, "enough for the demo; MMDialog's shards need 100 GiB")
    return Check("disk", "ok", detail)


def check_shared_memory(directory: Path = Path("/dev/shm")) -> Check:
    """Check the size of the memory that Ray's object store and DeepSpeed's CPU operators share."""
    name = "shared memory"
    if not directory.is_dir():
        return Check(name, "ok", f"no {directory} on this system; Ray uses the disk")
    size = shutil.disk_usage(directory).total
    detail = f"{directory} has {size / _GIB:.1f} GiB"
    if size < 2 * _GIB:
        return Check(name, "warn", detail, "in a container, start it with --shm-size=4g")
    return Check(name, "ok", detail)


def check_shipped_weights() -> Check:
    """Check that the demo's small model is complete: every part that its recipe names is there."""
    from d2i.recipes import load_recipe
    from d2i.weights_resolve import resolve_weights

    name = "demo weights"
    recipe = load_recipe("demo")
    encoders = recipe.encoders
    parts = [encoders.vae, encoders.clip_image, encoders.clip_text, recipe.backbone.weights]
    size = 0
    for part in filter(None, parts):
        try:
            directory = Path(resolve_weights(part))
        except D2IError as err:
            return Check(name, "fail", first_line(err), REINSTALL)
        sizes = [file.stat().st_size for file in directory.rglob("*.safetensors")]
        if not sizes:
            return Check(name, "fail", f"{part} holds no .safetensors file", REINSTALL)
        size += sum(sizes)
    return Check(name, "ok", f"{len(parts)} networks, {size / 2**20:.1f} MiB")


def check_vocabulary() -> Check:
    """Check that CLIP's vocabulary is available: a known prompt gives its known ids."""
    from d2i.tokenize import encode

    name = "CLIP vocabulary"
    try:
        ids = encode("a photo")
    except D2IError as err:
        return Check(name, "fail", first_line(err), "pip install open_clip_torch")
    if ids != [320, 1125]:
        return Check(name, "fail", f"'a photo' became {ids}, expected [320, 1125]", REINSTALL)
    return Check(name, "ok", "'a photo' has its published ids")


def check_inception(hub_dir: Path | None = None) -> Check:
    """Check that torch-fidelity's Inception file, for FID and IS, is in torch's cache and intact.

    Args:
        hub_dir: torch's cache; by default the one that torch names.
    """
    name = "Inception weights"
    path = inception_path(hub_dir)
    fix = f"download {INCEPTION_URL} to {path.parent}, or give --set metrics.extractor_weights=FILE"
    if not path.is_file():
        return Check(name, "warn", f"{_INCEPTION} is not in torch's cache", fix)
    expected = path.stem.rpartition("-")[2]
    digest = file_sha256(str(path))
    if not digest.startswith(expected):
        detail = f"{path} has sha256 {digest[:8]}, expected {expected}"
        return Check(name, "fail", detail, f"replace it with {INCEPTION_URL}")
    return Check(name, "ok", f"{_INCEPTION} in torch's cache")


_CHECKS: tuple[tuple[str, Callable[[], Check]], ...] = (
    ("Python", check_python),
    ("torch", check_torch),
    ("GPU", check_gpu),
    ("DeepSpeed", check_deepspeed),
    ("Ray", check_ray),
    ("disk", check_disk),
    ("shared memory", check_shared_memory),
    ("demo weights", check_shipped_weights),
    ("CLIP vocabulary", check_vocabulary),
    ("Inception weights", check_inception),
)


def inception_path(hub_dir: Path | None = None) -> Path:
    """Return the path of torch-fidelity's Inception file in torch's cache, there or not."""
    return _torch_cache(hub_dir) / "checkpoints" / _INCEPTION


def _torch_cache(hub_dir: Path | None) -> Path:
    if hub_dir is not None:
        return hub_dir
    import torch

    return Path(torch.hub.get_dir())


def _compile_problem(compiler: str, path: str) -> str:
    """Compile the two headers that every PyTorch extension includes; return the first error."""
    done = subprocess.run(
        [compiler, f"-I{sysconfig.get_path('include')}", "-fsyntax-only", "-x", "c++", "-"],
        input="#include <Python.h>\n#include <vector>\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PATH": path},
    )
    if done.returncode == 0:
        return ""
    return next((line for line in done.stderr.splitlines() if "error" in line), "no message")


def _end_group(process: subprocess.Popen[str]) -> None:
    """Kill what is left of a process and of its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stderr:
        process.stderr.close()
