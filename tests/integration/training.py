"""A tiny data set and network for tests of training, and the commands that train on it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2i.shards import Sample, json_bytes, npy_bytes, write_manifest, write_shard
from d2i.train.launcher import deepspeed_command
from tests.processes import run_d2i

NUM_STEPS = 6
SETTINGS = {
    "backbone.weights": "scratch",
    "backbone.latent_scale": 1.0,
    "backbone.latent_size": 4,
    "backbone.patch_size": 2,
    "backbone.dim": 16,
    "backbone.depth": 3,
    "backbone.num_heads": 2,
    "backbone.text_dim": 8,
    "train.num_steps": NUM_STEPS,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 2,
    "train.num_checkpoint_steps": 2,
    "train.num_log_steps": 3,
    "train.num_validation_steps": 3,
}


def write_split(directory: Path, split: str, num_samples: int, **sizes: int) -> None:
    """Write a split of two shards of random numbers."""
    random = np.random.default_rng(len(split))
    side, text_dim = sizes.get("side", 4), sizes.get("text_dim", 8)
    samples = [
        Sample(
            f"{split}-{number}",
            {
                "json": json_bytes({"key": f"{split}-{number}"}),
                "moments.npy": npy_bytes(
                    random.standard_normal((8, side, side)).astype(np.float16)
                ),
                "tokens.npy": npy_bytes(np.zeros(77, np.uint16)),
                "text.npy": npy_bytes(random.standard_normal((77, text_dim)).astype(np.float16)),
            },
        )
        for number in range(num_samples)
    ]
    half = num_samples // 2
    for number, part in enumerate((samples[:half], samples[half:])):
        write_shard(part, str(directory), number, failures={})
    (directory / "empty_tokens.npy").write_bytes(npy_bytes(np.zeros(77, np.uint16)))
    (directory / "empty_text.npy").write_bytes(npy_bytes(np.zeros((77, text_dim), np.float16)))
    write_manifest(str(directory), {})


def write_data(directory: Path) -> Path:
    """Write ten training and five validation samples."""
    for split, num_samples in (("train", 10), ("valid", 5)):
        (directory / split).mkdir(parents=True)
        write_split(directory / split, split, num_samples)
    return directory


def command(data: Path | str, run: Path | str, num_ranks: int = 2, **changed: Any) -> list[object]:
    """Return the `d2i train` command, with settings such as `train__seed=1` changed."""
    values = SETTINGS | {name.replace("__", "."): value for name, value in changed.items()}
    settings = [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
    return [
        *("train", "--recipe", "demo", "--data", data, "--run", run),
        *("--num-accelerators", num_ranks, *settings),
    ]


def run_on_ranks(program: Path, num_ranks: int, *arguments: object) -> None:
    """Run a program of the tests on ranks of its own, to its end."""
    launcher, *options = deepspeed_command([], num_ranks)
    ranks = options[: options.index(str(num_ranks)) + 1]
    root = str(program.parents[2])
    done = subprocess.run(
        [launcher, *ranks, str(program), *map(str, arguments)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def with_breadth(request: pytest.FixtureRequest) -> bool:
    """Return whether a soak test was asked for, which needs more than the sample."""
    return any(item.get_closest_marker("soak") for item in request.session.items)


def train(data: Path, run: Path, num_ranks: int = 2, **changed: Any) -> dict[str, Any]:
    """Run `d2i train` to its end; return its JSON."""
    result: dict[str, Any] = run_d2i(*command(data, run, num_ranks, **changed), "--json")
    return result


def losses(run: Path) -> list[float]:
    """Return the logged training losses, then those of validation."""
    found = []
    for name in ("metrics.jsonl", "validation.jsonl"):
        lines = [json.loads(line) for line in (run / name).read_text().splitlines()]
        assert [line["step"] for line in lines] == [3, 6]
        found += [line["loss"] for line in lines]
    return found


def keys_by_step(run: Path) -> dict[int, list[str]]:
    """Return the keys of every step by rank, as the last attempt at the step wrote them."""
    found: dict[int, list[str]] = {}
    for path in sorted((run / "keys").iterdir()):
        for line in map(json.loads, path.read_text().splitlines()):
            found.setdefault(line["step"], []).extend(line["keys"])
    return found


def ema_bytes(run: Path) -> bytes:
    """Return the EMA weights file of a finished run."""
    return (run / "ema.safetensors").read_bytes()
