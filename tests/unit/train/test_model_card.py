"""The model card of a run: its front matter, the terms of its parts, and a program that works."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from d2i.backbones import presets_of
from d2i.io.front_matter import front_matter, read_front_matter
from d2i.models.pipeline_dir import PipelineDirectory
from d2i.recipes import resolve_recipe
from d2i.train.model_card import CARD_NAME, card_of_repository, read_terms, write_model_card
from tests.integration.pipelines import save_tiny_sd15

LORA, FULL = "sd15-lora-photochat", "sd15-photochat"
ODD_NAME = "it's a \"base\": {x} # 'y' \\n \u202e"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny_sd15(directory)
    return directory


def write_card(base: Path, run: Path, recipe: str = LORA, *settings: str) -> str:
    """Write the card of a run on a base model, and return it."""
    directory = PipelineDirectory(str(base), presets_of("sd15"))
    resolved = resolve_recipe(recipe, [f"backbone.weights={base}", *settings])
    write_model_card(str(run), resolved, directory, str(run / "no-data"), "0" * 64)
    return (run / CARD_NAME).read_text()


def copied(tiny: Path, base: Path, **values: str) -> Path:
    """Copy a base model, with a README.md that has these values in its front matter."""
    shutil.copytree(tiny, base)
    if values:
        (base / "README.md").write_text(front_matter(values) + "# A model\n")
    return base


def terms_of(card: str) -> str:
    return " ".join(" ".join(read_terms(card)).split())


def program_of(card: str) -> str:
    (program,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return str(program)


def test_card_names_licence_of_repository_in_cache(tiny: Path, tmp_path: Path) -> None:
    base = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    copied(tiny, base, license="other", license_name="My 1.0", license_link="LICENSE")
    card = write_card(base, tmp_path / "run")
    link = "https://huggingface.co/owner/name/blob/main/LICENSE"
    assert read_front_matter(card) == {
        "base_model": "owner/name",
        "library_name": "diffusers",
        "license": "other",
        "license_name": "my-1.0",
        "license_link": link,
        "tags": ["dialog-to-image", "text-to-image", "lora"],
    }
    assert f"names its licence, my-1.0 ({link}), which holds" in terms_of(card)
    assert 'StableDiffusionPipeline.from_pretrained("owner/name")' in program_of(card)


def test_unknown_licence_is_said_with_place_to_look(tiny: Path, tmp_path: Path) -> None:
    base = copied(tiny, tmp_path / "models--owner--name" / "snapshots" / ("0" * 40))
    card = write_card(base, tmp_path / "run")
    assert read_front_matter(card)["license"] == "unknown"
    terms = terms_of(card)
    assert "look where it was published (https://huggingface.co/owner/name). The" in terms
    assert "published weights of this family are under CreativeML OpenRAIL-M." in terms
    assert "no plan of a known corpus" in terms


def test_name_of_directory_is_no_repository(tiny: Path, tmp_path: Path) -> None:
    base = copied(tiny, tmp_path / ODD_NAME, license="mit")
    card = write_card(base, tmp_path / "run", FULL, 'text.strategy=<{text}> \\ "it\'s"')
    values = read_front_matter(card)
    assert values == {
        "library_name": "diffusers",
        "license": "mit",
        "tags": ["dialog-to-image", "text-to-image"],
    }
    assert "\u202e" not in card
    texts = [n.value for n in ast.walk(ast.parse(program_of(card))) if isinstance(n, ast.Constant)]
    assert ODD_NAME.replace("\u202e", "\\u202e") in texts
    assert any('<look what i saw> \\ "it\'s"' in str(text) for text in texts)


@pytest.mark.parametrize(
    ("recipe", "part", "line"),
    [
        (LORA, "adapter", 'pipeline.load_lora_weights("me/dialogs")'),
        (
            FULL,
            "unet",
            'unet = UNet2DConditionModel.from_pretrained("me/dialogs", subfolder="unet")',
        ),
    ],
)
def test_card_of_repository_loads_from_it(
    tiny: Path, tmp_path: Path, recipe: str, part: str, line: str
) -> None:
    card = write_card(tiny, tmp_path / "run", recipe)
    assert f"RUN/{part}" in program_of(card)
    assert "--run RUN" in card
    ours = card_of_repository(card, "me/dialogs", part)
    assert line in program_of(ours).splitlines()
    assert "RUN" not in ours
    assert read_terms(ours) == read_terms(card) != []


def test_card_is_read_without_torch() -> None:
    code = "import d2i.train.model_card, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
