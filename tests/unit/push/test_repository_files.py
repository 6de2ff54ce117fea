"""Only whole, finished results are shown for an upload, and nothing of this machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import numpy as np
import pytest
from pydantic import BaseModel
from safetensors.numpy import save_file

from d2i.config import Config, Recipe
from d2i.errors import CheckpointError
from d2i.io import checksums, storage
from d2i.io.checksums import sha256_of
from d2i.push.repository_files import RECIPE_NAME, collect_files, shared_recipe
from d2i.recipe_file import to_toml
from d2i.recipes import load_recipe, resolve_recipe
from d2i.run_dir import RunConfig, result_names, start_or_resume
from d2i.train.model_card import CARD_NAME
from tests.processes import run_process

LORA, FULL = "sd15-lora-photochat", "sd15-photochat"
ADAPTER = "pytorch_lora_weights.safetensors"
CARD = "---\nbase_model: a/b\nlicense: mit\n---\n# Mine\n\n## Terms\n\n- one\n- two\n\n## How\n"


def write_weights(run: Path, name: str, step: int = 3, value: float = 1.0) -> None:
    with checksums.new_file(str(run / name)) as file:
        save_file({"weight": np.full(4, value, np.float32)}, file, {"step": str(step)})


def write_run(run: Path, recipe_name: str = LORA) -> Path:
    """Write what a finished run leaves of three steps, with numbers in place of a network."""
    recipe = resolve_recipe(recipe_name, ["fetch.contact=me@example.org"])
    config = RunConfig(recipe.model_dump(mode="json"), "/private/data", "0" * 64, 1)
    start_or_resume(str(run), config, is_begun=False)
    for number, name in enumerate(result_names(recipe).values()):
        write_weights(run, name, value=number)
        if recipe.adapter.kind is None:
            config_file = (run / name).with_name("config.json")
            config_file.write_text(json.dumps({"_name_or_path": "/private/base", "side": 8}))
    (run / CARD_NAME).write_text(CARD)
    return run


def test_shown_files_are_those_of_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    done = run_process("push", run, "me/dialogs", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    sizes = {file["path"]: file["size_bytes"] for file in result["files"]}
    assert list(sizes) == [
        *("README.md", "pytorch_lora_weights-ema-short.safetensors"),
        *("pytorch_lora_weights-trained.safetensors", ADAPTER, "recipe.toml"),
    ]
    assert sizes[ADAPTER] == (run / "adapter" / ADAPTER).stat().st_size
    assert result["terms"] == ["- one", "- two"]
    assert (result["licence"], result["private"], result["notes"]) == ("mit", True, [])


def without(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink()


def changed(name: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        data = (run / name).read_bytes()
        (run / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    return change


def of_other_step(run: Path) -> None:
    write_weights(run, f"adapter-trained/{ADAPTER}", step=6)


def with_card(data: bytes) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        (run / CARD_NAME).write_bytes(data)

    return change


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without("config.json"), "is not a run: config.json cannot be read"),
        (without(f"adapter/{ADAPTER}"), "does not exist; expected a finished run; repeat its d2i"),
        (without(f"adapter-trained/{ADAPTER}"), f"adapter-trained/{ADAPTER} does not exist"),
        (without(f"adapter-ema-short/{ADAPTER}"), f"adapter-ema-short/{ADAPTER} does not exist"),
        (without(CARD_NAME), "README.md does not exist; expected it in a finished run"),
        (changed(f"adapter/{ADAPTER}"), f"adapter/{ADAPTER} is damaged, or was edited"),
        (
            changed(f"adapter-trained/{ADAPTER}"),
            f"adapter-trained/{ADAPTER} is damaged, or was edited",
        ),
        (of_other_step, "was written after step 6, but the EMA after step 3"),
        (with_card(b"---\nlicense: [\n---\n"), "README.md: its front matter cannot be read"),
        (with_card(b"\xff"), "README.md: 'utf-8' codec can't decode"),
    ],
)
def test_unfinished_or_damaged_run_is_one_line_error(
    tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    run = write_run(tmp_path / "run")
    damage(run)
    done = run_process("push", run, "me/dialogs", "--upload", env={"HF_ENDPOINT": "http://[::1]:9"})
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert said in line
    assert line.startswith("error: ")


def test_run_of_other_network_names_command_that_shares_it(tmp_path: Path) -> None:
    config = RunConfig(load_recipe("demo").model_dump(mode="json"), "data", "0" * 64, 1)
    start_or_resume(str(tmp_path), config, is_begun=False)
    done = run_process("push", tmp_path, "me/dialogs")
    assert done.returncode == 2
    assert f"d2i weights import {tmp_path} --out DIR" in done.stderr


@pytest.mark.parametrize("name", ["dialogs", "a/b/c", "me/", "/me", "me/a--b", "me/a.git", "é/a"])
def test_malformed_repository_is_refused(tmp_path: Path, name: str) -> None:
    done = run_process("push", tmp_path, name)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"got the repository '{name}'; expected OWNER/NAME" in done.stderr


def test_config_of_network_is_shared_without_its_path(tmp_path: Path) -> None:
    files = {
        file.path: file.source
        for file in collect_files(str(write_run(tmp_path, FULL)), "me/a").files
    }
    for part in ("unet", "unet-ema-short", "unet-trained"):
        data = files[f"{part}/config.json"]
        assert isinstance(data, bytes)
        assert json.loads(data) == {"side": 8}


def test_remote_run_is_collected_like_local_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run, remote = write_run(tmp_path / "run"), "memory://runs/pushed"
    for path in run.rglob("*"):
        if path.is_file():
            storage.write_bytes(
                storage.join(remote, *path.relative_to(run).parts), path.read_bytes()
            )
    digests = [
        [(file.path, file.sha256) for file in collect_files(url, "me/a").files]
        for url in (str(run), remote)
    ]
    assert digests[0] == digests[1]
    name = storage.join(remote, "adapter-trained", ADAPTER)
    storage.write_bytes(name, storage.read_bytes(name)[:-1] + b"x")
    with pytest.raises(CheckpointError, match="is damaged, or was edited"):
        collect_files(remote, "me/a")


def text_settings(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the settings that take any text."""
    for name, field in kind.model_fields.items():
        if takes_text(field.annotation):
            yield f"{prefix}{name}"
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from text_settings(field.annotation, f"{prefix}{name}.")


def takes_text(annotation: Any) -> bool:
    """Return whether an annotation such as `Annotated[str, ...] | None` takes any text."""
    if get_origin(annotation) in (dict, tuple):
        return False
    return annotation is str or any(map(takes_text, get_args(annotation)))


# Words of the recipe, and no places.
WORDS = {
    *("name", "backbone.name", "corpus.earlier_images", "corpus.split_shares"),
    *("text.strategy", "adapter.targets", "sample.sampler"),
}
PLACES = sorted(set(text_settings(Recipe)) - WORDS)


@pytest.mark.parametrize("place", ["/private/base", "s3://private/base"])
@pytest.mark.parametrize("setting", PLACES)
def test_recipe_is_shared_without_places(setting: str, place: str) -> None:
    recipe = resolve_recipe(LORA, [])
    *groups, name = setting.split(".")
    values: dict[str, Any] = {name: place}
    for index in range(len(groups), 0, -1):
        part: Config = recipe
        for group in groups[:index]:
            part = getattr(part, group)
        values = {groups[index - 1]: part.model_copy(update=values)}
    private = recipe.model_copy(update=values)
    assert "private" in private.model_dump_json()
    assert "private" not in to_toml(shared_recipe(private))


def test_sha256_is_that_of_shared_bytes(tmp_path: Path) -> None:
    for file in collect_files(str(write_run(tmp_path)), "me/a").files:
        data = file.source if isinstance(file.source, bytes) else file.source.read_bytes()
        assert (file.sha256, file.size_bytes) == (sha256_of(data), len(data))
        if file.path == RECIPE_NAME:
            assert b"example.org" not in data
