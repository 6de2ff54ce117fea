"""A recipe shown as TOML and read from its file is the same recipe; a wrong file is one line."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from d2i.config import Config, Recipe
from d2i.errors import ConfigError
from d2i.io import checksums
from d2i.recipe_file import to_toml
from d2i.recipes import RECIPES, load_recipe, resolve_recipe, store_recipe
from tests.processes import COMMAND, run_process

TRICKY = (
    "text.strategy={text} \"a\" 'b' \\ \\n\n\ttab\r\x1b[31m\x7f\x85 \u202e \U000e0001 ü 😀",
    "corpus.earlier_images='''\"\"\"# [a]",
    "train.short_ema_length=null",
    "metrics.clip_text=null",
    "train.optim.lr=1e-300",
    "train.optim.betas=[0, 0.999999999999]",
    "train.seed=9223372036854775807",
    "text.max_turns=null",
    "image.draft=false",
    'metrics.classes=["a \\"red\\" ball", "null"]',
    'sample.pipeline={"eta": 0.0, "num_inference_steps": 4, "a.b \\n": "null", "é": "x"}',
)
START = "name = 'a'\nencoders = {}\nbackbone.name = 'uvit-s'\n"


def write(directory: Path, recipe: Recipe) -> str:
    path = directory / "own.toml"
    path.write_text(to_toml(recipe), encoding="utf-8")
    return str(path)


def set_values(config: Config) -> dict[str, Any]:
    """Return the settings that count as set, without groups that have none."""
    values = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Config):
            values[name] = set_values(value)
        elif name in config.model_fields_set:
            values[name] = value
    return {name: value for name, value in values.items() if value != {} or name == "pipeline"}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("settings", [(), TRICKY])
def test_toml_round_trip_keeps_values_and_unset_settings(
    tmp_path: Path, name: str, settings: tuple[str, ...]
) -> None:
    recipe = resolve_recipe(name, settings)
    read = resolve_recipe(write(tmp_path, recipe), [])
    assert read == recipe
    assert set_values(read) == set_values(recipe)
    assert to_toml(read) == to_toml(recipe)


@pytest.mark.parametrize("name", RECIPES)
def test_toml_with_every_setting_uncommented_has_same_values(tmp_path: Path, name: str) -> None:
    lines = to_toml(load_recipe(name)).splitlines()
    path = tmp_path / "all.toml"
    path.write_text("\n".join(s.removeprefix("#") if s[:2] != "# " else s for s in lines))
    assert load_recipe(str(path)) == load_recipe(name)
    assert all(s.startswith(("# ", "#")) or len(s) <= 100 for s in lines)


def test_toml_explains_groups_and_settings() -> None:
    text = to_toml(load_recipe("demo"))
    assert "\n# AdamW (paper, section 3.3).\n[train.optim]\nlr = 0.001\n" in text
    assert "\n# Linear warm-up, then constant.\nnum_warmup_steps = 20\n" in text
    assert list(tomllib.loads(text)) == ["name", *list(Recipe.model_fields)[1:]]
    assert max(len(line) for line in text.splitlines() if line.startswith("# ")) <= 96


def test_toml_escapes_what_acts_on_a_terminal() -> None:
    text = to_toml(resolve_recipe("demo", TRICKY))
    assert not set(text) & set("\x1b\x7f\x85\u202e\U000e0001\r\t")


def test_unset_settings_of_file_follow_those_they_depend_on(tmp_path: Path) -> None:
    changed = resolve_recipe(
        write(tmp_path, load_recipe("sd15-lora-photochat")), ["backbone.weights=/models/sd"]
    )
    assert changed.encoders.vae == "/models/sd/vae"
    name = write(tmp_path, load_recipe("unidiffuser-v1-photochat"))
    changed = resolve_recipe(name, ["train.unidiffuser.loss=t2i"])
    assert changed.train.condition_dropout == 0.1
    assert changed.sample.unconditional == "empty_token"


def test_absolute_paths_of_file_hold_in_another_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    for name in ("sd/vae", "sd/text_encoder", "openai/clip-vit-base-patch32"):
        (here / name).mkdir(parents=True)
    monkeypatch.chdir(here)
    recipe = resolve_recipe("sd15-photochat", ["backbone.weights=sd"])
    assert recipe.encoders.vae == str(here / "sd" / "vae")
    assert recipe.encoders.clip_image == str(here / "openai" / "clip-vit-base-patch32")
    name = write(here, recipe)
    monkeypatch.chdir(tmp_path)
    assert load_recipe(name) == recipe
    assert resolve_recipe(name, ["backbone.weights=other"]).encoders.vae == "other/vae"


def test_text_null_is_refused_where_it_would_be_read_as_null() -> None:
    recipe = resolve_recipe("demo", ['corpus.earlier_images="null"'])
    with pytest.raises(ConfigError, match=r"corpus\.earlier_images is the text 'null'"):
        to_toml(recipe)


def test_stored_recipe_and_printed_json_are_recipe_files(tmp_path: Path) -> None:
    recipe = load_recipe("sdxl-lora-photochat")
    store_recipe(recipe, str(tmp_path))
    stored = tmp_path / "recipe.json"
    assert load_recipe(str(stored)) == recipe
    assert load_recipe(stored.as_uri()) == recipe
    stored.write_text(stored.read_text().replace("3000", "4000"))
    with pytest.raises(ConfigError, match="delete"):
        load_recipe(str(stored))
    Path(checksums.checksum_url(str(stored))).unlink()
    assert load_recipe(str(stored)).train.num_steps == 4000


@pytest.mark.parametrize(
    ("name", "content", "hint"),
    [
        ("a.toml", "", "name is missing; expected"),
        ("a.toml", "name = 'a'\n[encoders]\n[backbone]\n[train]\n", "backbone.name is missing"),
        ("a.toml", "name_ = 'a'", "Recipe has no field 'name_'; did you mean 'name'?"),
        ("a.toml", "[train.optim]\nlrr = 1", "train.optim.lrr: OptimConfig has no field 'lrr'"),
        (
            "a.toml",
            f"{START}train.num_steps = 'null'",
            "train.num_steps is 'null': Input should be",
        ),
        ("a.toml", f"{START}train = 'null'", "train is 'null'"),
        ("a.toml", "name = a", "Invalid value (at line 1, column 8); expected TOML"),
        ("a.toml", "a = " + "[" * 100_000, "expected TOML"),
        ("a.toml", b"\xff", "expected TOML"),
        ("a.json", '{"name": ', "expected JSON"),
        ("a.json", "[]", "got a JSON list; expected an object"),
        ("a.json", '{"name": null}', "name is None: Input should be"),
        ("config.json", '{"recipe": {}, "data": "d"}', "the config.json of a run"),
        ("a.toml", None, "No such file"),
        ("a.json", None, "No such file"),
    ],
)
def test_wrong_file_is_one_line_error(
    tmp_path: Path, name: str, content: str | bytes | None, hint: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(path))
    message = str(caught.value)
    assert message.startswith(f"recipe {path}: ")
    assert hint in message
    assert "\n" not in message
    assert len(message) < 400 + len(str(path))


@pytest.mark.parametrize("setting", ["backbone.weights", "encoders.vae", "fetch.downloads"])
def test_host_in_recipe_file_counts_only_on_command_line(tmp_path: Path, setting: str) -> None:
    given = f"{setting}=https://example.org/x"
    path = write(tmp_path, resolve_recipe("demo", [given]))
    with pytest.raises(ConfigError, match=rf"{setting} is .*; if you trust that host, give --set"):
        resolve_recipe(path, [])
    assert resolve_recipe(path, [given]) == load_recipe(path)


def test_shown_recipe_is_accepted_by_commands(tmp_path: Path) -> None:
    shown = run_process("recipes", "show", "demo", "--set", "image.resolution=32")
    assert shown.returncode == 0, shown.stderr
    (tmp_path / "own.toml").write_text(shown.stdout)
    expected = resolve_recipe("demo", ["image.resolution=32"])
    assert load_recipe(str(tmp_path / "own.toml")) == expected
    printed = run_process("recipes", "show", tmp_path / "own.toml", "--json")
    assert Recipe.model_validate(json.loads(printed.stdout)) == expected
    line = json.dumps({"turns": [{"text": "a"}, {"text": "b", "images": ["a.jpg"]}]})
    (tmp_path / "chats").mkdir()
    (tmp_path / "chats" / "train.jsonl").write_text(line + "\n")
    planned = subprocess.run(
        [
            *COMMAND,
            *("preprocess", "--corpus", "jsonl", "--source", "chats", "--out", "out"),
            *("--recipe", "own.toml", "--workers", "0", "--dry-run", "--json"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["train"]["num_instances"] == 1


def test_train_passes_absolute_path_of_recipe_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from d2i.cli import train as command
    from d2i.train import launcher

    seen: list[str] = []

    def stop(arguments: list[str], num_accelerators: int | None) -> list[str]:
        del num_accelerators
        seen.extend(arguments)
        raise ConfigError("stopped")

    monkeypatch.setattr(launcher, "deepspeed_command", stop)
    monkeypatch.chdir(tmp_path)
    write(tmp_path, load_recipe("demo"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match="stopped"):
        command.train("own.toml", "data", "run")
    assert seen[:2] == ["--recipe", str(tmp_path / "own.toml")]


def test_showing_a_recipe_imports_no_torch() -> None:
    code = "import sys; from d2i.cli.recipes import show_recipe; show_recipe('demo', None)"
    code += "; print([m for m in ('torch', 'ray') if m in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
