"""Provenance in a metric card: the data, the training of a run, and the source of the guidance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from d2i.corpora.splits import corpus_name
from d2i.eval.generation_settings import choose_settings
from d2i.eval.metric_card import describe_data, describe_training
from d2i.eval.systems import parse_system
from d2i.models import changed_sizes, name_sizes
from d2i.recipes import load_recipe
from d2i.run_dir import BEST_NAME, EMA_NAME


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def write_run(run: Path, data: Path, **more: Any) -> None:
    recipe = load_recipe("uvit-s-photochat").model_dump(mode="json")
    recipe["text"]["strategy"] = "space"
    recipe["backbone"] |= {"depth": 3, "dim": 32}
    write(run / "config.json", {"recipe": recipe, "data": str(data)} | more)
    (run / EMA_NAME).write_bytes(b"")


@pytest.mark.parametrize(
    ("sizes", "name"),
    [
        ({}, "uvit-s"),
        ({"depth": 12, "dim": 512, "num_heads": 8}, "uvit-s"),
        ({"depth": 3, "dim": 32}, "uvit-s-shaped, 3 blocks of width 32"),
        ({"dim": 32}, "uvit-s-shaped, 12 blocks of width 32"),
        ({"num_text_tokens": 154}, "uvit-s with num_text_tokens 154"),
    ],
)
def test_network_name_states_changed_sizes(sizes: dict[str, Any], name: str) -> None:
    assert name_sizes("uvit-s", sizes) == name
    assert (changed_sizes("uvit-s", sizes) == {}) == (name == "uvit-s")


def test_run_of_changed_sizes_has_own_label(tmp_path: Path) -> None:
    write_run(tmp_path, tmp_path / "data")
    spec = parse_system(f"run:{tmp_path}", None, load_recipe("uvit-s-photochat"))
    assert spec.label.startswith("uvit-s-shaped, 3 blocks of width 32, ")


def test_corpus_name_is_read_from_corpus_json(tmp_path: Path) -> None:
    assert corpus_name(str(tmp_path)) is None
    for document in ({"name": "our chats"}, {"name": 3}, {"name": "a\nb"}, ["name"], {}):
        write(tmp_path / "corpus.json", document)
        expected = "our chats" if document == {"name": "our chats"} else None
        assert corpus_name(str(tmp_path)) == expected
    (tmp_path / "corpus.json").write_text("{")
    assert corpus_name(str(tmp_path)) is None
    write(tmp_path / "corpus.json", {"name": "x", "more": "y" * 5000})
    assert corpus_name(str(tmp_path)) is None


def test_describe_data_reads_plan(tmp_path: Path) -> None:
    assert describe_data(str(tmp_path)) == {"corpus": None}
    options = {"direction": "answer", "own_turn": "exclude", "image_root": "/pictures"}
    decided = {"corpus": "mmdialog", "split": "test", "recipe": {"corpus": options}}
    plan = write(tmp_path / "plan" / "plan.json", {"decided_by": decided})
    found = describe_data(str(tmp_path))
    # Reader defaults and the image directory do not change the instances.
    assert found == {
        "corpus": "mmdialog",
        "split": "test",
        "corpus_options": {"own_turn": "exclude"},
    }
    write(plan, {"decided_by": decided, "corpus_name": "made world"})
    assert describe_data(str(tmp_path))["corpus"] == "made world"


def test_describe_training_reads_run_config(tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    write(data / "train" / "manifest.json", {})
    write(data / "train" / "plan" / "plan.json", {"decided_by": {"corpus": "photochat"}})
    write_run(run, data)
    found = describe_training(str(run))
    assert found["trained_corpus"] == "photochat"
    assert found["trained_text"]["strategy"] == "space"
    # Older runs do not record it.
    assert "initial_weights" not in found
    write_run(run, tmp_path / "gone", initial_weights=None)
    found = describe_training(str(run))
    assert (found["trained_corpus"], found["initial_weights"]) == (None, None)


def test_guidance_by_names_recipe_selection_or_user(tmp_path: Path) -> None:
    write_run(tmp_path, tmp_path / "data")
    save_file({"weight": np.zeros(1, np.float32)}, tmp_path / EMA_NAME)
    system = f"run:{tmp_path}"
    for name in (system, "uvit-s"):
        assert choose_settings(name, []).guidance_by == {"how": "recipe"}
    best = {
        "weights": EMA_NAME,
        "guidance_scale": 3.0,
        "metric": "fid",
        "value": 20.5,
        "num_instances": 100,
        "seed": 0,
        "step": 850,
    }
    write(tmp_path / BEST_NAME, best | {"candidates": []})
    selection = {name: best[name] for name in ("metric", "value", "num_instances", "seed")}
    # Also when Divter generates with the run.
    for name in (system, f"divter:describer,{system}"):
        choice = choose_settings(name, ["sample.num_steps=3"])
        assert choice.guidance_by == {"how": "select", **selection}
        assert "sample.guidance_scale=3.0" in choice.settings
        assert choice.settings[-1] == "sample.num_steps=3"
        # Only the run itself reads the dialog.
        assert ('text.strategy="space"' in choice.settings) == (name == system)
    # A setting of the command overrides it.
    given = choose_settings(system, ["sample.guidance_scale=4"])
    assert given.guidance_by == {"how": "given"}
    # It was selected for the EMA, so it does not apply to other weights.
    other = choose_settings(system, ["sample.weights=trained"])
    assert other.guidance_by == {"how": "recipe"}
    assert not any(setting.startswith("sample.guidance_scale") for setting in other.settings)
