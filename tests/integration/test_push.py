"""Results of real runs are pushed to a hub on loopback, and stock programs load them from there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from d2i.io.checksums import sha256_of
from d2i.io.front_matter import front_matter, read_front_matter
from d2i.recipe_file import read_recipe_file
from d2i.run_dir import read_recipe
from tests.hub import TOKEN, Hub
from tests.integration.fine_tuning import FULL, LORA, prepare, train_command
from tests.integration.pipelines import save_tiny_sd15
from tests.processes import run_d2i, run_process
from tests.servers import running

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]

REPOSITORY = "me/dialogs"
ADAPTER = "pytorch_lora_weights.safetensors"
NETWORK = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a base model, data, and a run of each kind."""
    directory = tmp_path_factory.mktemp("someone")
    base = directory / "base"
    save_tiny_sd15(base)
    (base / "README.md").write_text(front_matter({"license": "creativeml-openrail-m"}))
    config = base / "unet" / "config.json"
    values = json.loads(config.read_text()) | {"_name_or_path": str(directory / "elsewhere")}
    config.write_text(json.dumps(values))
    data = prepare(LORA, base, directory, 60)
    for recipe, name in ((LORA, "lora"), (FULL, "full")):
        run_d2i(*train_command(recipe, base, data, directory / name, train__num_steps=2))
    return directory


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running(Hub()) as server:
        yield server


def push(hub: Hub, run: Path, *words: object, repository: str = REPOSITORY) -> Any:
    """Run `d2i push`, which must succeed; return its JSON."""
    done = push_process(hub, run, *words, "--json", repository=repository)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def push_process(
    hub: Hub, run: Path, *words: object, repository: str = REPOSITORY, **env: str
) -> subprocess.CompletedProcess[str]:
    done = run_process(
        *("push", run, repository, *words), env=hub.environment(run.parent / "hub-home") | env
    )
    assert TOKEN not in done.stdout + done.stderr
    return done


def one_line_error(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def run_program_of_card(hub: Hub, place: Path) -> str:
    """Run the program of the pushed card as its reader would; return what it prints."""
    card = hub.repositories[REPOSITORY].files["README.md"].decode()
    (program,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    program = program.replace('"base"', repr(str(place / "base")))
    program = program.replace('beach")', 'beach", num_inference_steps=1)')
    program += "\nprint(image.size, pipeline.get_active_adapters())\n"
    home = hub.environment(place / "reader")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={**os.environ, **home},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "more than one weights file" not in done.stderr
    return done.stdout.splitlines()[-1]


def test_nothing_is_sent_without_upload(place: Path, hub: Hub) -> None:
    done = push_process(hub, place / "lora")
    assert done.returncode == 0, done.stderr
    assert hub.requests == []
    data = (place / "lora" / "adapter" / ADAPTER).read_bytes()
    line = f"  {ADAPTER}: {len(data):,} bytes, sha256 {sha256_of(data)}"
    assert line in done.stdout.splitlines()
    assert f"{hub.url}/{REPOSITORY} (private): 5 files" in done.stdout
    assert "licence: creativeml-openrail-m" in done.stdout
    assert "names its licence, creativeml-openrail-m, which holds" in done.stdout
    assert done.stdout.splitlines()[-1] == "nothing was uploaded; to upload this, add --upload"
    result = push(hub, place / "lora", "--public")
    assert (result["private"], result["uploaded"], result["commit"]) == (False, False, None)
    assert hub.requests == []


def test_lora_arrives_in_one_commit_and_loads_by_program_of_card(place: Path, hub: Hub) -> None:
    shown = push(hub, place / "lora")
    result = push(hub, place / "lora", "--upload")
    assert shown | {"uploaded": True, "commit": result["commit"]} == result
    repository = hub.repositories[REPOSITORY]
    assert repository.is_private
    # The hub's own first commit, and the upload.
    assert len(repository.commits) == 2
    files = {path: data for path, data in repository.files.items() if path != ".gitattributes"}
    assert {file["path"]: file["sha256"] for file in result["files"]} == {
        path: sha256_of(data) for path, data in files.items()
    }
    for kind, path in {
        "adapter": ADAPTER,
        "adapter-ema-short": "pytorch_lora_weights-ema-short.safetensors",
        "adapter-trained": "pytorch_lora_weights-trained.safetensors",
    }.items():
        assert files.pop(path) == (place / "lora" / kind / ADAPTER).read_bytes()
    assert files.keys() == {"README.md", "recipe.toml"}
    check_is_shareable(repository.files, place)
    assert read_front_matter(files["README.md"].decode())["license"] == "creativeml-openrail-m"
    assert run_program_of_card(hub, place) == "(64, 64) ['default_0']"
    again = push_process(hub, place / "lora", "--upload")
    assert again.stdout.splitlines()[-1] == (
        f"nothing was uploaded, as nothing has changed: {hub.url}/{REPOSITORY}/commit/"
        f"{result['commit']}"
    )
    assert again.stderr == ""
    assert len(repository.commits) == 2


def test_whole_network_arrives_and_loads_by_program_of_card(place: Path, hub: Hub) -> None:
    push(hub, place / "full", "--upload", "--public")
    repository = hub.repositories[REPOSITORY]
    assert not repository.is_private
    assert repository.files.keys() - {".gitattributes"} == {
        *("README.md", "recipe.toml"),
        *(f"unet{kind}/{NETWORK}" for kind in ("", "-ema-short", "-trained")),
        *(f"unet{kind}/config.json" for kind in ("", "-ema-short", "-trained")),
    }
    for part in ("unet", "unet-ema-short", "unet-trained"):
        file = f"{part}/{NETWORK}"
        assert repository.files[file] == (place / "full" / file).read_bytes()
    check_is_shareable(repository.files, place)
    assert run_program_of_card(hub, place).startswith("(64, 64)")


def check_is_shareable(files: dict[str, bytes], place: Path) -> None:
    """Check that nothing names a directory of this machine, and that the recipe is the run's."""
    for path, data in files.items():
        assert str(place).encode() not in data, path
        assert b"/tmp/" not in data, path
    kept = place / "recipe.toml"
    kept.write_bytes(files["recipe.toml"])
    shared = read_recipe_file(str(kept))
    own = read_recipe(str(place / ("lora" if shared.adapter.kind else "full")))
    for part in ("image", "text", "adapter", "train", "sample"):
        assert getattr(shared, part) == getattr(own, part)
    assert shared.backbone.weights == "base"


def test_other_results_of_earlier_push_go_with_commit(place: Path, hub: Hub) -> None:
    push(hub, place / "lora", "--upload")
    result = push(hub, place / "full", "--upload")
    assert len(result["removed"]) == 3
    assert not any(path.startswith("pytorch_lora") for path in hub.repositories[REPOSITORY].files)
    assert len(hub.repositories[REPOSITORY].commits) == 3


def test_choice_of_select_is_what_programs_load_by_default(
    place: Path, hub: Hub, tmp_path: Path
) -> None:
    run = tmp_path / "lora"
    shutil.copytree(place / "lora", run)
    best = run_d2i(
        *("select", "--run", run, "--metric", "clip_i", "--guidance", 5, "--num-instances", 2),
        "--json",
    )
    push(hub, run, "--upload")
    files = hub.repositories[REPOSITORY].files
    assert files[ADAPTER] == (run / best["weights"]).read_bytes()
    kinds = {"ema", "ema-short", "trained"} - {best["weights_kind"]}
    variants = {f"pytorch_lora_weights-{kind}.safetensors" for kind in kinds}
    assert variants == {path for path in files if path.startswith("pytorch_lora_weights-")}
    assert "selected on validation dialogs with guidance scale 5 |" in files["README.md"].decode()


def test_refusals_of_hub_are_one_line(place: Path, hub: Hub) -> None:
    run = place / "lora"
    error = one_line_error(push_process(hub, run, "--upload", HF_TOKEN=""))
    assert "got no token of the hub" in error
    assert hub.requests == []
    error = one_line_error(push_process(hub, run, "--upload", HF_TOKEN="hf_wrong"))
    assert "does not accept the token (401)" in error
    error = one_line_error(push_process(hub, run, "--upload", HF_HUB_OFFLINE="1"))
    assert "HF_HUB_OFFLINE" in error
    error = one_line_error(push_process(hub, run, "--upload", HF_ENDPOINT="http://127.0.0.1:9"))
    assert "was not uploaded to http://127.0.0.1:9" in error
    assert not hub.repositories
    hub.refused = {"/api/repos/create": 403}
    done = push_process(hub, run, "--upload")
    assert "may not write to me/dialogs (403)" in one_line_error(done)
    # Shown before anything is sent.
    assert "licence: creativeml-openrail-m" in done.stdout
    hub.refused = {"/lfs/": 403}
    assert "(403)" in one_line_error(push_process(hub, run, "--upload"))
    hub.refused = {f"/api/models/{REPOSITORY}/commit": 409}
    assert "refused me/dialogs (409)" in one_line_error(push_process(hub, run, "--upload"))
    # Nothing of it is in the repository, and the same command goes on.
    assert hub.repositories[REPOSITORY].files.keys() == {".gitattributes"}
    hub.refused = {}
    assert push(hub, run, "--upload")["uploaded"]
    assert "is private; expected a public" in one_line_error(
        push_process(hub, run, "--upload", "--public")
    )
    hub.repositories[REPOSITORY].is_private = False
    assert "is public, so everybody" in one_line_error(push_process(hub, run, "--upload"))


def test_repository_of_something_else_is_left_alone(place: Path, hub: Hub) -> None:
    push(hub, place / "lora", "--upload")
    repository = hub.repositories[REPOSITORY]
    repository.commits.append({".gitattributes": b"", "README.md": b"", "model.bin": b""})
    error = one_line_error(push_process(hub, place / "lora", "--upload"))
    assert "holds files that d2i did not push, such as model.bin" in error
    assert len(repository.commits) == 3


def test_card_that_hub_refuses_is_named(place: Path, hub: Hub, tmp_path: Path) -> None:
    run = tmp_path / "lora"
    shutil.copytree(place / "lora", run)
    card = (run / "README.md").read_text()
    (run / "README.md").write_text(card.replace("creativeml-openrail-m", "my-own", 1))
    error = one_line_error(push_process(hub, run, "--upload"))
    assert 'README.md. - "license" must be one of' in error
    assert hub.repositories[REPOSITORY].files.keys() == {".gitattributes"}
