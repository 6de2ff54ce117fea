"""Real two-rank DeepSpeed: resumed to the bit, and the same losses for ZeRO 0, 1 and 2."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from d2i.shards import Sample, json_bytes, npy_bytes, write_manifest, write_shard
from tests.processes import COMMAND, run_d2i, run_process

NUM_SAMPLES, NUM_STEPS = 10, 6
SETTINGS = {
    "backbone.weights": "null",
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
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    samples = [
        Sample(
            f"train-{number}",
            {
                "json": json_bytes({"key": f"train-{number}"}),
                "moments.npy": npy_bytes(rng.standard_normal((8, 4, 4)).astype(np.float16)),
                "tokens.npy": npy_bytes(np.zeros(77, np.uint16)),
                "text.npy": npy_bytes(rng.standard_normal((77, 8)).astype(np.float16)),
            },
        )
        for number in range(NUM_SAMPLES)
    ]
    write_shard(samples, str(folder), 0, failures={})
    (folder / "empty_tokens.npy").write_bytes(npy_bytes(np.zeros(77, np.uint16)))
    (folder / "empty_text.npy").write_bytes(npy_bytes(np.zeros((77, 8), np.float16)))
    write_manifest(str(folder), {})
    return folder


def command(data: Path, run: Path, **changed: object) -> list[object]:
    values = SETTINGS | {name.replace("__", "."): value for name, value in changed.items()}
    settings = [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
    return [
        *("train", "--recipe", "demo", "--data", data, "--run", run),
        *("--num-accelerators", "2", *settings),
    ]


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6]
    return [line["loss"] for line in lines]


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    run_d2i(*command(data, run))
    return run


@pytest.mark.parametrize("fault", ["train.step_done:kill:3", "train.checkpoint_written:kill:2"])
def test_a_killed_run_resumes_to_the_bit(
    data: Path, undisturbed: Path, tmp_path: Path, fault: str
) -> None:
    run = tmp_path / "killed"
    killed = run_process(*command(data, run), "--fault", fault)
    assert killed.returncode == 1
    assert not (run / "ema.safetensors").exists()
    run_d2i(*command(data, run))
    assert losses(run) == losses(undisturbed)
    assert (run / "ema.safetensors").read_bytes() == (undisturbed / "ema.safetensors").read_bytes()


def test_the_ranks_end_with_the_command(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    """SIGKILL reaches neither launcher nor ranks; they must not go on writing to the run."""
    run = tmp_path / "killed"
    asleep = [*COMMAND, *map(str, command(data, run)), "--fault", "train.step_done:sleep:3"]
    with subprocess.Popen(asleep, stderr=subprocess.PIPE) as process:
        while not (run / "checkpoints" / "step-2" / "complete.json").exists():
            assert process.poll() is None
            time.sleep(0.1)
        process.kill()
    run_d2i(*command(data, run))
    assert losses(run) == losses(undisturbed)


@pytest.mark.parametrize("stage", [0, 2])
def test_zero_stages_agree(data: Path, undisturbed: Path, tmp_path: Path, stage: int) -> None:
    run = tmp_path / "run"
    run_d2i(*command(data, run, train__zero_stage=stage))
    np.testing.assert_allclose(losses(run), losses(undisturbed), rtol=1e-5)


def test_what_a_run_cannot_go_on_with_is_refused(data: Path, undisturbed: Path) -> None:
    alone = run_process(*command(data, undisturbed), "--num-accelerators", "1")
    assert alone.returncode == 2
    assert "was written by 2 ranks, got 1" in alone.stderr
    other = run_process(*command(data, undisturbed, train__seed=1))
    assert other.returncode == 2
    assert "recipe.train.seed: 1, expected 0" in other.stderr
