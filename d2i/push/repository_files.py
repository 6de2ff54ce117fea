"""The files of a finished run that its repository on the hub holds, and their names there.

They are what a reader needs: the trained weights where diffusers looks for them, the model card and
the recipe. Checkpoints, optimizer state, logs, data and paths of this machine stay in the run. Must
not import torch.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from d2i.backbones import presets_of
from d2i.config import BackboneConfig, EncodersConfig, Recipe, WeightsKind
from d2i.errors import CheckpointError
from d2i.io import checksums, storage
from d2i.io.front_matter import read_front_matter
from d2i.io.parse import parse_json
from d2i.recipe_file import to_toml
from d2i.run_dir import last_step, load_selection, read_recipe, result_names, result_step
from d2i.train.model_card import CARD_NAME, card_of_repository, read_terms

RECIPE_NAME = "recipe.toml"
_CONFIG_NAME = "config.json"
_REWRITE = "repeat the d2i train command of this run, which writes it from the last checkpoint"
_WORDS: dict[WeightsKind, str] = {
    "ema": "the moving average (EMA) of the weights",
    "ema-short": "a shorter average of the weights",
    "trained": "the weights that the optimizer updated",
}


@dataclass(frozen=True)
class RepositoryFile:
    """One file of a repository.

    Args:
        path: Its path there.
        size_bytes: Its length.
        sha256: Its hash.
        source: The local file, or its bytes.
    """

    path: str
    size_bytes: int
    sha256: str
    source: Path | bytes = field(repr=False)


@dataclass(frozen=True)
class RepositoryFiles:
    """The files of a run for a repository, and what its user should know before they are shared.

    Args:
        files: By path, the model card first.
        step: The steps of training after which the default weights were written.
        licence: The identifier in the front matter of the model card.
        terms: The lines of the card about the licences of base model and data.
        notes: What a reader will miss, a line for each.
    """

    files: tuple[RepositoryFile, ...]
    step: int
    licence: str
    terms: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Weights:
    """One file of weights; with a guidance scale, the choice of `d2i select`."""

    url: str
    kind: WeightsKind
    step: int
    guidance_scale: float | None = None

    @property
    def words(self) -> str:
        chosen = (
            ""
            if self.guidance_scale is None
            else f", selected on validation dialogs with guidance scale {self.guidance_scale:g}"
        )
        return f"{_WORDS[self.kind]}, after step {self.step}{chosen}"


def collect_files(run_url: str, repository: str) -> RepositoryFiles:
    """Check the results of a run, and name the files that a repository is to hold.

    The default weights, those which stock programs load, are those that `d2i eval` generates with:
    the choice of `d2i select`, else the EMA. The run's other kinds of weights stand beside them.

    Args:
        run_url: The run.
        repository: The repository, `OWNER/NAME`; the card's program loads from it.

    Raises:
        CheckpointError: If the run is not finished, did not train a pipeline's network, or one of
            its files is missing, damaged, or of another step.
    """
    recipe = read_recipe(run_url)
    if presets_of(recipe.backbone.name).pipeline is None:
        raise CheckpointError(
            f"{run_url} trained {recipe.backbone.name}, which has no pipeline of diffusers; "
            "expected a run of one that has, such as sd15; d2i weights import "
            f"{run_url} --out DIR writes a directory with a card that you can share"
        )
    names = result_names(recipe)
    part, _, file = names["ema"].partition("/")
    weights = _find_weights(run_url, recipe)
    config = None if recipe.adapter.kind else _network_config(storage.join(run_url, part))
    placed: dict[str, _Weights] = {}
    files: list[RepositoryFile] = []
    for index, found in enumerate(weights):
        mark = f"-{found.kind}" if index else ""
        if config is None:
            path = f"{PurePath(file).stem}{mark}{PurePath(file).suffix}"
        else:
            path = f"{part}{mark}/{file}"
            files.append(_of_bytes(f"{part}{mark}/{_CONFIG_NAME}", config))
        placed[path] = found
        files.append(_of_file(path, found.url))
    card = card_of_repository(_read_card(run_url), repository, part)
    values = _read_metadata(card, run_url)
    card += _describe_files(placed, is_lora=config is None)
    files += [
        _of_bytes(CARD_NAME, card.encode()),
        _of_bytes(RECIPE_NAME, to_toml(shared_recipe(recipe)).encode()),
    ]
    return RepositoryFiles(
        files=tuple(sorted(files, key=lambda one: (one.path != CARD_NAME, one.path))),
        step=weights[0].step,
        licence=str(values.get("license") or "not named"),
        terms=tuple(read_terms(card)),
        notes=tuple(_notes(values)),
    )


def shared_recipe(recipe: Recipe) -> Recipe:
    """Return the settings of a recipe that another machine can use.

    Paths, URLs, the contact and what only concerns fetching are left out; of the base model its
    name is kept. Encoders are those of the base model.
    """
    weights = str(recipe.backbone.weights)
    # An absolute path, or a URL.
    is_place = PurePath(weights).is_absolute() or "://" in weights
    backbone = recipe.backbone.model_dump(exclude_none=True) | {
        "weights": PurePath(weights).name if is_place else weights
    }
    elsewhere = {"descriptions": None, "image_root": None, "open_images_url": None}
    return Recipe(
        name=recipe.name,
        corpus=recipe.corpus.model_copy(update=elsewhere),
        image=recipe.image,
        text=recipe.text,
        encoders=EncodersConfig(),
        backbone=BackboneConfig(**backbone),
        adapter=recipe.adapter,
        train=recipe.train.model_copy(update={"wandb_project": None}),
        sample=recipe.sample,
    )


def _find_weights(run_url: str, recipe: Recipe) -> list[_Weights]:
    """Return the weights of a finished run, the default first.

    Raises:
        CheckpointError: If some are missing, or are not of one step.
    """
    names, step = result_names(recipe), last_step(run_url, recipe)
    if step is None:
        raise CheckpointError(
            f"{storage.join(run_url, names['ema'])} does not exist; expected a finished run; "
            "repeat its d2i train command to finish it"
        )
    found: dict[WeightsKind, _Weights] = {}
    for kind, name in names.items():
        if kind != "ema-short" or recipe.train.short_ema_length is not None:
            found[kind] = _check_result(storage.join(run_url, name), kind, step)
    best = load_selection(run_url, logging.getLogger(__name__).warning)
    if best is None:
        return list(found.values())
    kind, made = best.weights_kind, result_step(best.weights)
    chosen = _Weights(best.weights, kind, step if made is None else made, best.guidance_scale)
    return [chosen, *(other for other in found.values() if other.kind != kind)]


def _check_result(url: str, kind: WeightsKind, step: int) -> _Weights:
    if not storage.exists(url):
        raise CheckpointError(f"{url} does not exist; expected it in a finished run; {_REWRITE}")
    made = result_step(url)
    if made not in (None, step):
        raise CheckpointError(
            f"{url} was written after step {made}, but the EMA after step {step}; expected all "
            "weights of one step, as a training that has ended leaves them; repeat the d2i train "
            "command of this run"
        )
    return _Weights(url, kind, step)


def _network_config(directory: str) -> bytes:
    """Return the `config.json` of a network, without the path that it was once loaded from."""
    url = storage.join(directory, _CONFIG_NAME)
    values = parse_json(_read(url), url, error=CheckpointError, next_step=_REWRITE)
    values.pop("_name_or_path", None)
    return (json.dumps(values, indent=2) + "\n").encode()


def _read_card(run_url: str) -> str:
    url = storage.join(run_url, CARD_NAME)
    try:
        return _read(url).decode()
    except UnicodeDecodeError as err:
        raise CheckpointError(f"{url}: {err}; expected UTF-8; save it in that encoding") from err


def _read(url: str) -> bytes:
    try:
        return storage.read_bytes(url)
    except FileNotFoundError as err:
        raise CheckpointError(
            f"{url} does not exist; expected it in a finished run; {_REWRITE}"
        ) from err


def _read_metadata(card: str, run_url: str) -> dict[str, Any]:
    try:
        return read_front_matter(card)
    except ValueError as err:
        raise CheckpointError(
            f"{storage.join(run_url, CARD_NAME)}: its front matter cannot be read: {err}; expected "
            "YAML; correct it"
        ) from err


def _notes(values: dict[str, Any]) -> list[str]:
    if values.get("base_model"):
        return []
    return [
        f"{CARD_NAME} names no base_model on the hub, so readers cannot fetch it by its name; add "
        "it to the front matter and the program of that file in the run"
    ]


def _describe_files(weights: dict[str, _Weights], *, is_lora: bool) -> str:
    """Return the section of the card about the files beside it."""
    rows = [f"| `{path}` | {found.words} |" for path, found in weights.items()]
    rows.append(f"| `{RECIPE_NAME}` | the settings, for `d2i train --recipe {RECIPE_NAME}` |")
    other = list(weights)[-1]
    directory = other.partition("/")[0]
    choice = f'weight_name="{other}"' if is_lora else f'subfolder="{directory}"'
    lines = [
        "",
        "## Files",
        "",
        "| file | content |",
        "|---|---|",
        *rows,
        "",
        f"Programs load the first by default, and another one with, for example, `{choice}`.",
    ]
    return "\n".join(lines) + "\n"


def _of_file(path: str, url: str) -> RepositoryFile:
    local = storage.local_copy(url)
    digest = checksums.known_sha256(str(local))
    recorded = checksums.read_checksum(url)
    checksums.compare(url, digest, recorded, next_step=_REWRITE, error=CheckpointError)
    return RepositoryFile(path, local.stat().st_size, digest, local)


def _of_bytes(path: str, data: bytes) -> RepositoryFile:
    return RepositoryFile(path, len(data), checksums.sha256_of(data), data)
