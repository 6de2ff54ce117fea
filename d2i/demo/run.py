"""The demo's stages: the same commands that a cluster's user types, in order, on a made corpus.

Every command runs in its own process and resumes where it was interrupted. Finished stages and
their times are recorded in `times.json`, so the same command resumes an interrupted demo.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from d2i import __version__
from d2i.errors import ClusterError, ConfigError, D2IError
from d2i.io import checksums, storage
from d2i.io.child_process import die_with_parent
from d2i.io.config_lock import lock_or_diff
from d2i.io.parse import read_json

NUM_RANKS = 2
_CHOOSE_ANOTHER = "choose another --out"
NUM_WORKERS = 2


@dataclass(frozen=True)
class DemoRequest:
    """One demo: everything that determines its numbers, and its output directory."""

    out: Path
    seed: int
    num_dialogs: int
    num_steps: int | None


@dataclass(frozen=True)
class Stage:
    """One step of the demo: a d2i command line, or a function of the demo itself."""

    name: str
    arguments: tuple[str, ...] = ()
    function: Callable[[], str] | None = None


def run_demo(request: DemoRequest) -> dict[str, Any]:
    """Run every stage that is not finished yet.

    Returns:
        The report's path, attribute accuracies (0..1), scores before and after, seconds by stage.

    Raises:
        ConfigError: If the directory holds a demo with other settings.
        ClusterError: If a stage fails; its output was printed, and the same command retries it.
    """
    with storage.exclusive_lock(str(request.out)):
        return _run_stages(request)


def _run_stages(request: DemoRequest) -> dict[str, Any]:
    _check_resumable(request)
    times = _Times(request.out / "times.json")
    for stage in _stages(request):
        if stage.name in times.seconds:
            _print_line(f"{stage.name}: already done, in {times.seconds[stage.name]:.0f} s")
            continue
        _print_line(f"{stage.name}: {_command_line(stage)}")
        times.begin(stage)
        started = time.monotonic()
        detail = stage.function() if stage.function else _run_command(stage)
        times.keep(stage, time.monotonic() - started, detail)
    return _result(request, times)


def _stages(request: DemoRequest) -> list[Stage]:
    from d2i.demo.attribute_accuracy import judge_evaluations
    from d2i.demo.corpus import write_corpus

    out = request.out
    corpus, data, run = out / "corpus", out / "data", out / "run"
    before, after = out / "eval" / "before", out / "eval" / "after"

    def make_corpus() -> str:
        write_corpus(corpus, request.num_dialogs, request.seed)
        return f"{request.num_dialogs:,} dialogs"

    def judge() -> str:
        return judge_evaluations([before, after], data / "test", corpus)

    return [
        Stage("corpus", function=make_corpus),
        _command(
            "preprocess",
            *("preprocess", "--corpus", "mmdialog", "--source", corpus, "--out", data),
            *("--recipe", "demo", "--workers", NUM_WORKERS),
        ),
        _evaluation(request, before, "--system", "uvit-s", "--weights", "demo:backbone"),
        _command(
            "train",
            *("train", "--recipe", "demo", "--data", data, "--run", run),
            *("--num-accelerators", NUM_RANKS, "--set", f"train.seed={request.seed}"),
            *_steps(request),
        ),
        _evaluation(request, after, "--system", f"run:{run}"),
        Stage("judge", function=judge),
        _command(
            "report",
            *("report", before, after, "--out", out / "report.html"),
            *("--times", out / "times.json", "--title", "d2i demo: demo network, made world"),
        ),
    ]


def _evaluation(request: DemoRequest, out: Path, *system: object) -> Stage:
    return _command(
        f"evaluate {out.name}",
        *("eval", *system, "--data", request.out / "data", "--out", out),
        *("--parallel", "--workers", NUM_WORKERS, "--save-images", "all"),
        *("--set", f"sample.seed={request.seed}"),
    )


def _steps(request: DemoRequest) -> list[str]:
    return [] if request.num_steps is None else ["--set", f"train.num_steps={request.num_steps}"]


def _command(name: str, *arguments: object) -> Stage:
    return Stage(name, tuple(str(argument) for argument in arguments))


class _Times:
    """Seconds and details of finished stages, in `times.json`.

    An interrupted stage has the time of its last attempt only, and is marked as resumed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept: dict[str, Any] = {"machine": _machine(), "begun": [], "stages": []}
        if path.exists():
            self._kept = read_json(str(path), next_step=f"delete it, or {_CHOOSE_ANOTHER}")
        self._is_resumed = False

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each finished stage, by name."""
        return {stage["name"]: stage["seconds"] for stage in self._kept["stages"]}

    @property
    def resumed(self) -> list[str]:
        """Names of finished stages that were interrupted before."""
        return [stage["name"] for stage in self._kept["stages"] if stage["resumed"]]

    def begin(self, stage: Stage) -> None:
        """Record that a stage has begun."""
        self._is_resumed = stage.name in self._kept["begun"]
        if not self._is_resumed:
            self._kept["begun"].append(stage.name)
            self._write()

    def keep(self, stage: Stage, seconds: float, detail: str) -> None:
        """Record a finished stage."""
        self._kept["stages"].append(
            {
                "name": stage.name,
                "command": _command_line(stage),
                "seconds": round(seconds, 2),
                "resumed": self._is_resumed,
                "detail": detail,
            }
        )
        self._write()

    def _write(self) -> None:
        data = (json.dumps(self._kept, indent=1) + "\n").encode()
        checksums.write_bytes(str(self._path), data)


def _check_resumable(request: DemoRequest) -> None:
    wanted = {k: v for k, v in asdict(request).items() if k != "out"} | {"version": __version__}
    if differences := lock_or_diff(str(request.out / "demo.json"), wanted):
        raise ConfigError(
            f"{request.out} holds another demo: got {'; '.join(differences)}; choose another --out"
        )


def _run_command(stage: Stage) -> str:
    """Run a d2i command in its own process; return its last line of output, a summary."""
    command = [sys.executable, "-c", "from d2i.cli import main; main()", *stage.arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent
    ) as process:
        lines = []
        try:
            for line in process.stdout or ():
                sys.stderr.write(f"  {line}")
                lines.append(line.strip())
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise ClusterError(
            f"the demo's stage '{stage.name}' failed with exit code {process.returncode}; see the "
            "output above; once that is fixed, repeat the command: finished stages are kept"
        )
    return lines[-1] if lines else ""


def _command_line(stage: Stage) -> str:
    return "d2i " + shlex.join(stage.arguments) if stage.arguments else "within d2i demo"


def _result(request: DemoRequest, times: _Times) -> dict[str, Any]:
    result: dict[str, Any] = {"report": str(request.out / "report.html")}
    groups: dict[str, dict[str, float]] = {}
    for name in ("before", "after"):
        directory = request.out / "eval" / name
        scores = _read(directory / "scores.json")["scores"]
        judged = _read(directory / "judged.json")
        accuracy = judged["accuracy"]
        result[f"attribute_accuracy_{name}"] = accuracy["generated"]
        result[f"fid_{name}"], result[f"clip_i_{name}"] = scores["fid"], scores["clip_i"]
        groups[name] = {g: means["generated"] for g, means in judged["groups"].items()}
        result["attribute_accuracy_true"] = accuracy["true"]
        result["attribute_accuracy_chance"] = accuracy["chance"]
        result["attribute_accuracy_shuffled"] = accuracy["shuffled"]
    result["attribute_accuracy_by_group"] = groups
    return result | {"seconds": times.seconds, "resumed": times.resumed}


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(str(path), next_step=_CHOOSE_ANOTHER)
    except OSError as err:
        raise D2IError(
            f"{path}: {err}; expected what an earlier stage wrote; {_CHOOSE_ANOTHER}"
        ) from err


def _machine() -> str:
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"


def _print_line(line: str) -> None:
    sys.stderr.write(f"d2i demo: {line}\n")
    sys.stderr.flush()
