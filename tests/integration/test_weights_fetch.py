"""Weights are downloaded from a hub on loopback; jobs then find them without a network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from d2i.doctor import machine
from d2i.doctor.node import check_weights
from d2i.doctor.weights import _fetch_inception
from d2i.weights_resolve import resolve_weights
from tests.hub import Hub, Repository
from tests.integration.pipelines import save_tiny_sd15
from tests.processes import run_process
from tests.servers import running

OFFLINE = {"HF_HUB_OFFLINE": "1"}
ENCODERS = ("vae", "clip_image", "clip_text")


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running(Hub()) as server:
        yield server


def add(hub: Hub, name: str, directory: Path, subfolder: str = "") -> None:
    """Make a directory a repository of the hub, or a part of one."""
    found = hub.repositories.setdefault(name, Repository(is_private=False))
    for path in directory.rglob("*"):
        if path.is_file():
            place = subfolder / path.relative_to(directory)
            found.files[str(place)] = path.read_bytes()


def fetch(recipe: str, settings: dict[str, str], env: dict[str, str]) -> tuple[int, dict[str, Any]]:
    """Run the command; return its exit code, and its rows by the setting."""
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    done = run_process("weights", "fetch", "--recipe", recipe, *words, "--json", env=env)
    assert done.stdout, done.stderr[-3000:]
    return done.returncode, {row["name"]: row for row in json.loads(done.stdout)["checks"]}


def test_encoders_of_recipe_are_downloaded_and_then_found_offline(hub: Hub, tmp_path: Path) -> None:
    settings = {"metrics.clip_text": "me/clip_text"}
    for name in ENCODERS:
        # Of another directory: two repositories, and one with a part.
        subfolder, place = ("vae", "me/parts/vae") if name == "vae" else ("", f"me/{name}")
        settings[f"encoders.{name}"] = place
        repository = "/".join(place.split("/")[:2])
        add(hub, repository, Path(resolve_weights(f"demo:{name}")), subfolder)
    environment = hub.environment(tmp_path)

    code, rows = fetch("demo", settings, environment | OFFLINE)
    assert code == 1
    assert rows["weights encoders.vae"]["status"] == "fail"

    code, rows = fetch("demo", settings, environment)
    assert (code, {row["status"] for row in rows.values()}) == (0, {"ok"})
    assert rows["weights encoders.vae"]["detail"].endswith("downloaded now")

    num_requests = len(hub.requests)
    code, rows = fetch("demo", settings, environment | OFFLINE)
    assert (code, {row["status"] for row in rows.values()}) == (0, {"ok"})
    assert "downloaded" not in rows["weights encoders.vae"]["detail"]
    assert len(hub.requests) == num_requests


@pytest.mark.soak
def test_pipeline_is_downloaded_with_card_but_without_other_formats(
    hub: Hub, tmp_path: Path
) -> None:
    save_tiny_sd15(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "base" / "all-in-one.ckpt").write_bytes(b"large")
    add(hub, "me/base", tmp_path / "base")
    environment = hub.environment(tmp_path / "home")
    settings = {
        "backbone.weights": "me/base",
        "metrics.extractor": "clip",
        "metrics.clip_text": "null",
    }
    for name in ENCODERS:
        settings[f"encoders.{name}"] = f"demo:{name}"
    for variables, ending in ((environment, "downloaded now"), (environment | OFFLINE, "cache")):
        code, rows = fetch("sd15-lora-photochat", settings, variables)
        assert code == 0, rows
        assert rows["weights backbone.weights"]["detail"].endswith(ending)
    names = {path.name for path in (tmp_path / "home").rglob("*")}
    assert {"README.md", "model_index.json", "diffusion_pytorch_model.safetensors"} <= names
    assert "all-in-one.ckpt" not in names


def test_weights_that_cannot_be_had_are_rows_with_next_step(hub: Hub, tmp_path: Path) -> None:
    settings = {
        "encoders.vae": "me/nothing",
        "encoders.clip_image": str(tmp_path / "nothing"),
        "encoders.clip_text": "demo:clip_text",
        "metrics.extractor": "clip",
        "metrics.clip_text": "null",
    }
    code, rows = fetch("uvit-s-photochat", settings, hub.environment(tmp_path / "home"))
    assert code == 1
    found = {name.removeprefix("weights "): row["status"] for name, row in rows.items()}
    assert found == {
        "encoders.vae": "fail",
        "encoders.clip_image": "fail",
        "encoders.clip_text": "ok",
        "backbone.weights": "warn",
    }
    assert "mscoco_uvit_small.pth" in rows["weights backbone.weights"]["detail"]
    for row in rows.values():
        assert bool(row["fix"]) == (row["status"] != "ok")


def test_every_setting_has_a_row_whatever_it_names(hub: Hub, tmp_path: Path) -> None:
    """Names that are no repository, URLs that cannot be read, and files that are not there."""
    settings = {
        "encoders.vae": "./nothing",
        "encoders.clip_image": "../models/nothing.pth",
        "encoders.clip_text": "ftp://127.0.0.1:9/nothing",
        "encoders.text_prefix": "models/nothing",
        "metrics.clip_text": "https://127.0.0.1:9/nothing",
        "metrics.extractor_weights": "foreign://nothing",
        "backbone.weights": "weights/mscoco_uvit_small.pth",
    }
    code, rows = fetch("demo", settings, hub.environment(tmp_path / "home"))
    assert code == 1
    assert list(rows) == [f"weights {setting}" for setting in CHECKED]
    for row in rows.values():
        assert (row["status"], bool(row["fix"])) == ("fail", True), row
    missing = rows["weights backbone.weights"]
    assert (
        missing["detail"] == "weights/mscoco_uvit_small.pth: no such file; expected a path or URL"
    )
    assert missing["fix"] == "d2i does not download these, see d2i weights list"


CHECKED = (
    *("encoders.vae", "encoders.clip_image", "encoders.clip_text", "encoders.text_prefix"),
    *("backbone.weights", "metrics.clip_text", "metrics.extractor_weights"),
)


@pytest.mark.parametrize(
    "value",
    ["./nothing.pth", "../w/x.pth", "w/x.pth", "a--b/c", "s3::x://y", "ftp://127.0.0.1:9/x"],
)
def test_weights_that_are_no_repository_are_a_row(value: str) -> None:
    found = check_weights("backbone.weights", value)
    assert (found.status, bool(found.fix)) == ("fail", True)


def test_inception_is_not_downloaded_offline_or_into_read_only_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    found = _fetch_inception()
    assert (found.status, "Not a directory" in found.detail) == ("fail", True), found

    home = tmp_path / "cache"
    environment = {"TORCH_HOME": str(home), "HF_HOME": str(home)} | OFFLINE
    code, rows = fetch("demo", {"metrics.extractor": "inception"}, environment)
    assert (code, rows["Inception weights"]["status"]) == (1, "fail")
    assert "HF_HUB_OFFLINE" in rows["Inception weights"]["detail"]
    assert not home.exists() or not list(home.rglob("*.pth"))


@pytest.mark.parametrize("is_whole", [True, False])
def test_inception_is_downloaded_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_whole: bool
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    data = b"numbers"
    name = f"weights-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    (tmp_path / name).write_bytes(data if is_whole else data[:-1])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "_INCEPTION", name)
    monkeypatch.setattr("d2i.doctor.weights.INCEPTION_URL", (tmp_path / name).as_uri())
    found = _fetch_inception()
    assert found.status == ("ok" if is_whole else "fail")
    assert (tmp_path / "cache" / "hub" / "checkpoints" / name).exists() == is_whole
