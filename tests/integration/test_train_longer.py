"""A finished run is extended: same result as a run of full length, and crash-safe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from d2i.config import LEGACY_DEFAULTS
from d2i.errors import ConfigError
from d2i.eval.generation_settings import choose_settings
from d2i.eval.systems import parse_system
from d2i.io import checksums
from d2i.recipes import change_recipe
from d2i.run_dir import RESULT_NAMES, last_step, read_recipe
from tests.integration.training import command, train
from tests.processes import run_process

SHORT, LONG = 5, 9
# Neither 5 nor 9 is a step of logging, validation or checkpoints: only a run's end writes theirs.
CADENCE = {
    "train__num_log_steps": 3,
    "train__num_validation_steps": 4,
    "train__num_checkpoint_steps": 2,
    "train__num_checkpoints_kept": 9,
}


def words(data: Path, run: Path, num_steps: int, **changed: Any) -> list[object]:
    return command(data, run, 1, train__num_steps=num_steps, **(CADENCE | changed))


def results(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in RESULT_NAMES.values()}


def lines(run: Path) -> list[list[dict[str, Any]]]:
    """Return the lines of metrics and validation without fields that depend on time."""
    timed = {"images_per_s", "elapsed_s", "data_wait", checksums.CRC_FIELD}
    return [
        [
            {name: value for name, value in json.loads(line).items() if name not in timed}
            for line in (run / file).read_text().splitlines()
        ]
        for file in ("metrics.jsonl", "validation.jsonl")
    ]


@pytest.fixture(scope="module")
def short(training_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "short"
    train(training_data, run, 1, train__num_steps=SHORT, **CADENCE)
    return run


@pytest.fixture(scope="module")
def whole(training_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(training_data, run, 1, train__num_steps=LONG, **CADENCE)
    return run


@pytest.fixture
def run(short: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(short, tmp_path / "run"))


def test_extended_run_equals_run_of_full_length(
    training_data: Path, run: Path, short: Path, whole: Path
) -> None:
    """A killed extension keeps the old results, and the same command resumes it."""
    assert [line["step"] for line in lines(short)[0]] == [3, 5]
    assert [line["step"] for line in lines(short)[1]] == [4, 5]
    longer = words(training_data, run, LONG)
    assert run_process(*longer, "--fault", "train.step_done:kill:3").returncode != 0
    assert (results(run), last_step(str(run))) == (results(short), SHORT)
    assert read_recipe(str(run)).train.num_steps == SHORT

    done = run_process(*longer, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["finished"]
    assert json.loads(done.stdout)["step"] == LONG
    assert results(run) == results(whole)
    assert lines(run) == lines(whole)
    assert [line["step"] for line in lines(run)[0]] == [3, 6, 9]
    assert [line["step"] for line in lines(run)[1]] == [4, 8, 9]
    assert (run / "config.json").read_bytes() == (whole / "config.json").read_bytes()
    for name in RESULT_NAMES.values():
        with safe_open(run / name, "pt") as opened:
            assert opened.metadata()["step"] == str(LONG)


def test_resume_writes_only_missing_final_metrics(
    training_data: Path, run: Path, short: Path
) -> None:
    """As after a kill between the last checkpoint and the last metrics line."""
    kept = (run / "metrics.jsonl").read_text().splitlines(keepends=True)[:-1]
    (run / "metrics.jsonl").write_text("".join(kept))
    assert run_process(*words(training_data, run, SHORT)).returncode == 0
    assert lines(run) == lines(short)
    for name in ("validation.jsonl", "config.json", *RESULT_NAMES.values()):
        assert (run / name).read_bytes() == (short / name).read_bytes(), name


def test_fewer_steps_than_trained_is_error(training_data: Path, run: Path, short: Path) -> None:
    fewer = run_process(*words(training_data, run, SHORT - 1))
    assert fewer.returncode == 2
    assert f"train.num_steps is 4, but {run} has already made 5 steps" in fewer.stderr
    assert results(run) == results(short)


def test_extending_run_without_checkpoints_is_error(
    training_data: Path, run: Path, short: Path
) -> None:
    shutil.rmtree(run / "checkpoints")
    longer = run_process(*words(training_data, run, LONG))
    assert longer.returncode == 2
    assert "was finished at step 5 and its checkpoints are gone" in longer.stderr
    assert "--set backbone.weights=PATH" in longer.stderr
    assert results(run) == results(short)


def test_selection_of_shorter_run_is_ignored_with_warning(
    run: Path, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = {"weights": "select/step-4.safetensors", "step": 4, "guidance_scale": 3.0}
    candidates = {"candidates": [{"step": 4}, {"step": 5}]}
    (run / "select").mkdir()
    shutil.copy(run / "ema.safetensors", run / "select" / "step-4.safetensors")
    checksums.write_bytes(str(run / "best.json"), json.dumps(chosen | candidates).encode())
    system, recipe = f"run:{run}", read_recipe(str(run))
    assert parse_system(system, None, recipe).backbone.weights == str(run / chosen["weights"])
    assert chosen_by_select(system) == ["sample.guidance_scale=3.0", "sample.weights=ema"]
    assert not caplog.records

    for name in ("ema.safetensors", "ema.safetensors.sha256"):
        shutil.copy(whole / name, run / name)
    assert parse_system(system, None, recipe).backbone.weights == str(run / "ema.safetensors")
    assert chosen_by_select(system) == []
    (message,) = caplog.messages
    assert "best.json is not used: it was chosen when the run had 5 steps, and it has 9" in message


def chosen_by_select(system: str) -> list[str]:
    """Return the settings of a run without the text that it was trained on."""
    settings = choose_settings(system, []).settings
    return [setting for setting in settings if not setting.startswith("text.")]


@pytest.mark.soak
def test_backward_compatibility_of_run_without_ema_warmup(
    training_data: Path, tmp_path: Path, short: Path
) -> None:
    """A run without EMA warm-up, without short EMA, and without the step in its results."""
    run = tmp_path / "run"
    former = {"train__ema_warmup": "false", "train__short_ema_length": "null"}
    train(training_data, run, 1, train__num_steps=SHORT, **CADENCE, **former)
    assert not (run / "ema-short.safetensors").exists()
    config = json.loads((run / "config.json").read_text())
    for path in LEGACY_DEFAULTS:
        section, name = path.split(".")
        del config["recipe"][section][name]
    (run / "config.json").write_text(json.dumps(config))
    for path in run.glob("*.sha256"):
        path.unlink()
    (run / "trained.safetensors").unlink()
    ema = (run / "ema.safetensors").read_bytes()
    (run / "ema.safetensors").write_bytes(ema.replace(b'"step":"5"', b'"stop":"5"'))
    assert last_step(str(run)) == SHORT
    assert (run / "ema.safetensors").read_bytes() != (short / "ema.safetensors").read_bytes()

    recipe = read_recipe(str(run))
    assert parse_system(f"run:{run}", None, recipe).backbone.weights == str(run / "ema.safetensors")
    for kind in ("trained", "ema-short"):
        other = change_recipe(recipe, [f"sample.weights={kind}"])
        with pytest.raises(ConfigError, match=rf"is {kind}, .* the run has ema\.safetensors"):
            parse_system(f"run:{run}", None, other)
    refused = run_process(*words(training_data, run, LONG))
    assert refused.returncode == 2
    assert "recipe.train.ema_warmup: True, expected False" in refused.stderr
    assert "--set train.ema_warmup=false --set train.short_ema_length=null" in refused.stderr
    done = run_process(*words(training_data, run, LONG, **former))
    assert done.returncode == 0, done.stderr
    assert last_step(str(run)) == LONG
