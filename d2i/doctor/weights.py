"""The weights that a recipe names; those that only the hub has are downloaded ahead of a job."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from d2i.backbones import presets_of
from d2i.config import Recipe
from d2i.doctor.check import Check, first_line, run_checks
from d2i.doctor.machine import INCEPTION_URL, check_inception, inception_path
from d2i.doctor.node import check_weights, is_offline
from d2i.errors import CheckpointError, D2IError
from d2i.weights_catalog import weights_to_fetch
from d2i.weights_resolve import resolve_weights


def weights_of(recipe: Recipe) -> tuple[tuple[str, str], ...]:
    """Return (setting, value) of all weights that a recipe names."""
    named = {
        "encoders.vae": recipe.encoders.vae,
        "encoders.clip_image": recipe.encoders.clip_image,
        "encoders.clip_text": recipe.encoders.clip_text,
        "encoders.text_prefix": recipe.encoders.text_prefix,
        "backbone.weights": None if recipe.backbone.is_random else recipe.backbone.weights,
        "metrics.clip_text": recipe.metrics.clip_text,
        "metrics.extractor_weights": recipe.metrics.extractor_weights,
    }
    return tuple((setting, value) for setting, value in named.items() if value)


def fetch_weights(recipe: Recipe) -> Iterator[Check]:
    """Download the weights that a recipe's jobs would, into the caches that they read.

    Encoders are loaded once on the CPU, as a job loads them, so that what was downloaded is known
    to be whole. A repository that is a pipeline is downloaded, not loaded.

    Yields:
        One `Check` per setting. Nothing is raised: weights that are missing are `fail` rows.
    """
    # These modules import torch.
    from d2i.encoders import ClipImage, ClipText, Vae

    loaders: dict[str, Callable[[str], Any]] = {
        "encoders.vae": partial(Vae, kind=recipe.encoders.vae_kind),
        "encoders.clip_image": ClipImage,
        "encoders.clip_text": ClipText,
        "metrics.clip_text": ClipText,
    }
    if presets_of(recipe.backbone.name).pipeline:
        loaders["backbone.weights"] = partial(_download_pipeline, recipe.backbone.name)
    yield from run_checks(
        (f"weights {setting}", partial(_fetch, setting, value, loaders.get(setting, _find_file)))
        for setting, value in weights_of(recipe)
    )
    if recipe.backbone.weights is None:
        detail = f"not set; training needs {weights_to_fetch(recipe.backbone.name)}"
        yield Check("weights backbone.weights", "warn", detail, "--set backbone.weights=PATH")
    if recipe.metrics.extractor == "inception" and recipe.metrics.extractor_weights is None:
        yield _fetch_inception()


def _fetch(setting: str, value: str, load: Callable[[str], Any]) -> Check:
    before = check_weights(setting, value)
    try:
        load(value)
    except (D2IError, OSError) as err:
        detail, _, fix = first_line(err).rpartition("; ")
        if not detail:
            detail, fix = fix, "check the name or URL, the network, and permission to read there"
        return Check(f"weights {setting}", "fail", detail, fix)
    found = check_weights(setting, value)
    if found.status != "ok":
        return Check(found.name, "fail", f"{found.detail}, though it was loaded now", found.fix)
    if before.status == "ok":
        return found
    return Check(found.name, "ok", f"{found.detail}, downloaded now")


def _find_file(value: str) -> None:
    """Find weights that must be a file or directory here, or at a URL, which is fetched.

    Raises:
        CheckpointError: If there is none.
        OSError: If the URL cannot be read.
    """
    if not Path(resolve_weights(value)).exists():
        raise CheckpointError(
            f"{value}: no such file; expected a path or URL; d2i does not download these, see "
            "d2i weights list"
        )


def _download_pipeline(backbone: str, name: str) -> None:
    """Download the files of a pipeline, as diffusers chooses them, and the card with its licence.

    Raises:
        CheckpointError: If it is not the pipeline of that backbone, or a part is missing.
        OSError: If the hub cannot be reached, or has no such repository.
    """
    from d2i.models.pipeline_dir import PipelineDirectory

    if not Path(resolve_weights(name)).exists():
        from diffusers import DiffusionPipeline
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        DiffusionPipeline.download(name)
        with contextlib.suppress(EntryNotFoundError):
            hf_hub_download(name, "README.md")
    PipelineDirectory(name, presets_of(backbone))


def _fetch_inception() -> Check:
    """Download torch-fidelity's Inception file into torch's cache, if it is not there."""
    import torch

    found = check_inception()
    if found.status != "warn":
        return found
    if is_offline():
        return Check(found.name, "fail", f"{found.detail}, and HF_HUB_OFFLINE is set", found.fix)
    path = inception_path()
    digits = path.stem.rpartition("-")[2]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(INCEPTION_URL, str(path), digits, progress=False)
    except (OSError, RuntimeError) as err:
        return Check(found.name, "fail", f"{INCEPTION_URL}: {first_line(err)}", found.fix)
    return check_inception()
