"""Training on two DeepSpeed ranks: bit-exact resume, stop signals, other world sizes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from d2i.eval.systems import parse_system
from d2i.recipes import load_recipe
from d2i.train.checkpoint.checkpoint_files import complete_checkpoints
from tests.integration.training import (
    command,
    ema_bytes,
    keys_by_step,
    losses,
    train,
)
from tests.processes import COMMAND, command_lines, run_d2i, run_process

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def data(training_data: Path) -> Path:
    return training_data


@pytest.fixture
def undisturbed(trained: Path) -> Path:
    return trained


@pytest.mark.soak
@pytest.mark.parametrize("fault", ["train.step_done:kill:3", "train.checkpoint_written:kill:2"])
def test_killed_training_resumes_bit_exactly(
    data: Path, undisturbed: Path, tmp_path: Path, fault: str
) -> None:
    run = tmp_path / "killed"
    words = command(data, run, train__record_keys="true")
    assert run_process(*words, "--fault", fault).returncode != 0
    run_d2i(*words)
    assert losses(run) == losses(undisturbed)
    assert ema_bytes(run) == ema_bytes(undisturbed)


def test_killed_training_resumes_bit_exactly_without_damaged_checkpoint(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """The resumed run reads remote data through a cache: same samples, so same bits."""
    run, cache = tmp_path / "killed", tmp_path / "cache"
    changed = {"train__record_keys": "true", "train__num_checkpoint_steps": 1}
    killed = run_process(*command(data, run, **changed), "--fault", "train.step_done:kill:5")
    assert killed.returncode != 0
    assert not (run / "ema.safetensors").exists()
    newest = Path(complete_checkpoints(str(run))[-1])
    part = next(newest.glob("part-0-*"))
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    elsewhere = command(f"simplecache::file://{data}", run, **changed)
    again = run_process(*elsewhere, "--cache-dir", cache, "--cache-gb", "0.001")
    assert again.returncode == 0, again.stderr
    assert f"warning: {newest} is damaged" in again.stderr
    assert len(list(cache.glob("*.d2i-tar"))) > 1
    assert losses(run) == losses(undisturbed)
    assert ema_bytes(run) == ema_bytes(undisturbed)


def test_run_records_initial_weights(undisturbed: Path) -> None:
    config = json.loads((undisturbed / "config.json").read_text())
    assert config["initial_weights"] == {"file": "scratch"}
    assert parse_system(f"run:{undisturbed}", None, load_recipe("demo")).label == (
        "uvit-s-shaped, 3 blocks of width 16, trained from scratch"
    )


def test_ranks_die_with_killed_command(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    """SIGKILL reaches only the command; launcher and ranks must stop writing to the run."""
    run = tmp_path / "killed"
    asleep = command(data, run, train__record_keys="true")
    with started([*asleep, "--fault", "train.step_done:sleep:3"]) as process:
        wait_for(process, run / "checkpoints" / "step-2" / "complete.json")
        process.kill()
    train(data, run, train__record_keys="true")
    assert losses(run) == losses(undisturbed)


@pytest.mark.parametrize(
    ("number", "to_all", "code"),
    [
        (signal.SIGTERM, True, 0),
        pytest.param(signal.SIGUSR1, False, 0, marks=pytest.mark.soak),
        (signal.SIGINT, False, 130),
    ],
)
def test_stop_signal_writes_checkpoint_and_resume_hint(
    data: Path, tmp_path: Path, number: signal.Signals, code: int, *, to_all: bool
) -> None:
    """The signal goes to the command alone, or also to launcher and ranks, as when a job ends."""
    run = tmp_path / "stopped"
    long = {"train__num_steps": 100_000, "train__num_checkpoint_steps": 100_000}
    with started(command(data, run, **long)) as process:
        wait_for(process, run / "metrics.jsonl")
        for other, words in command_lines():
            if str(run) in words and (to_all or other == process.pid):
                os.kill(other, number)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == code, stderr
    assert "resume with the same command, from step-" in stderr
    assert len(list((run / "checkpoints").glob("step-*/complete.json"))) == 1
    assert not (run / "ema.safetensors").exists()


def test_resume_with_other_world_size_keeps_data_order(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """One rank, then two, then one again: losses within 1e-5, EMA within 1e-6.

    Micro batch size, ZeRO stage and activation checkpointing change with the world size.
    """
    run = tmp_path / "elastic"
    ways = (
        (1, {"train__micro_batch_size": 2}),
        (2, {"train__micro_batch_size": 4, "train__zero_stage": 2}),
        (1, {"train__micro_batch_size": 8, "train__activation_checkpointing": "true"}),
    )
    for number, (num_ranks, changed) in enumerate(ways):
        words = command(data, run, num_ranks, train__record_keys="true", **changed)
        if number < 2:
            # Both attempts end after their third step: the first at step 3, the second at step 5.
            words += ["--fault", "train.step_done:kill:3"]
        assert (run_process(*words).returncode == 0) == (number == 2)
    np.testing.assert_allclose(losses(run), losses(undisturbed), rtol=1e-5)
    ours, theirs = (load_file(directory / "ema.safetensors") for directory in (run, undisturbed))
    for name, average in ours.items():
        np.testing.assert_allclose(average, theirs[name], rtol=0, atol=1e-6)
    order = keys_by_step(undisturbed)
    assert sorted(order) == [1, 2, 3, 4, 5, 6]
    seen = {(step, key) for step, keys in keys_by_step(run).items() for key in keys}
    assert seen == {(step, key) for step, keys in order.items() for key in keys}


def test_preflight_of_demo_script_measures_and_trains_nothing(data: Path, tmp_path: Path) -> None:
    """`train/demo.sh --preflight` writes no checkpoints, so the run can start afterwards."""
    words = [str(word) for word in command(data, tmp_path)]
    settings = words[words.index("--set") :]
    line = [ROOT / "train" / "demo.sh", data, tmp_path / "run", "--preflight", *settings]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run" / "preflight.json").read_text())
    assert found["world_size"] == 2
    assert found["device_distance"] < found["max_device_distance"]
    assert found["micro_batch_size"] * found["num_micro_batches"] == 4
    for name in ("all_reduce_gb_per_s", "input_samples_per_s", "images_per_s", "peak_memory_gb"):
        assert found[name] > 0, name
    reckoned = found["reckoned_memory"]
    assert reckoned["weights"] <= reckoned["total"] < reckoned["available"]
    assert reckoned["settings"] == []
    assert "memory: " in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_zero_3_gives_same_losses_and_weights_and_goes_on(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run, zero = tmp_path / "run", ("--zero", ROOT / "train" / "zero-3.json")
    done = run_process(*command(data, run), *zero)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(losses(run), losses(undisturbed), rtol=1e-5)
    for name in ("ema", "trained"):
        found, expected = (
            load_file(directory / f"{name}.safetensors") for directory in (run, undisturbed)
        )
        assert found.keys() == expected.keys()
        for key, weights in found.items():
            np.testing.assert_allclose(weights, expected[key], rtol=1e-3, atol=1e-5)
    longer = command(data, run, train__num_steps=7)
    assert run_d2i(*longer, *zero, "--json")["step"] == 7


def test_resume_with_changed_seed_is_error(data: Path, undisturbed: Path) -> None:
    other = run_process(*command(data, undisturbed, train__record_keys="true", train__seed=1))
    assert other.returncode == 2
    assert "recipe.train.seed: 1, expected 0" in other.stderr


def test_finished_run_without_checkpoints_is_left_unchanged(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run, ignore=shutil.ignore_patterns("checkpoints"))
    again = run_process(*command(data, run, 1, train__record_keys="true"))
    assert again.returncode == 0, again.stderr
    assert "is finished and its checkpoints are gone: nothing to do" in again.stderr
    assert losses(run) == losses(undisturbed)
    assert ema_bytes(run) == ema_bytes(undisturbed)


def test_nan_loss_error_names_step_and_samples(data: Path, tmp_path: Path) -> None:
    diverged = run_process(*command(data, tmp_path / "run", 1, train__optim__lr=1e30))
    assert diverged.returncode == 2
    assert "the loss of step" in diverged.stderr
    assert "(samples train-" in diverged.stderr
    assert "train.optim.lr below" in diverged.stderr


def started(words: list[object]) -> subprocess.Popen[str]:
    line = [*COMMAND, *map(str, words)]
    return subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen[str], path: Path) -> None:
    while not (path.exists() and path.stat().st_size):
        assert process.poll() is None
        time.sleep(0.1)
