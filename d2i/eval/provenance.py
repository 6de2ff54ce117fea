"""Provenance of test data and runs, as far as their files record it, for the metric card.

It decides whether a table may call a system by the paper's name. Files of earlier versions record
less; missing facts are left out.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from d2i.corpora import CORPORA
from d2i.errors import DataError
from d2i.io import storage
from d2i.io.config_lock import read_settings
from d2i.run_dir import CONFIG_NAME, read_recipe

# Options that decide the instances, and the context of each.
_OPTIONS = ("direction", "own_turn", "images_in_turn", "repeated", "earlier_images", "emoji")


def describe_data(data_url: str) -> dict[str, Any]:
    """Describe the corpus, split and options that a data set was planned from.

    Returns:
        `corpus` (None where no plan names it), and with a plan `split` and `corpus_options`: those
        that differ from the corpus reader's defaults.
    """
    plan = _read_object(storage.join(data_url, "plan", "plan.json"))
    decided = plan.get("decided_by") or {}
    layout = decided.get("corpus")
    if not layout:
        return {"corpus": None}
    options = (decided.get("recipe") or {}).get("corpus") or {}
    return {
        "corpus": str(plan.get("corpus_name") or layout),
        "split": decided.get("split"),
        "corpus_options": _changed(str(layout), options),
    }


def describe_training(run_url: str) -> dict[str, Any]:
    """Describe the data and weights that a run was trained from.

    Returns:
        `trained_text`, the text settings that it was trained with; `trained_corpus`, None where
        its data are missing or have no plan; and `initial_weights`, where the run records them.
    """
    config = _read_object(storage.join(run_url, CONFIG_NAME))
    data = config.get("data")
    # The run may come from a stranger: contact no host for something only the card needs.
    is_here = isinstance(data, str) and not storage.names_host(data)
    places = (storage.join(data, "train"), data) if data and is_here else ()
    corpora = (describe_data(url)["corpus"] for url in places)
    known = {
        "trained_text": read_recipe(run_url).text.model_dump(mode="json"),
        "trained_corpus": next(filter(None, corpora), None),
    }
    if "initial_weights" in config:
        known["initial_weights"] = config["initial_weights"]
    return known


def _changed(layout: str, options: dict[str, Any]) -> dict[str, Any]:
    kind = CORPORA.get(layout)
    defaults = {field.name: field.default for field in dataclasses.fields(kind)} if kind else {}
    return {
        name: value
        for name in _OPTIONS
        if (value := options.get(name)) is not None and value != defaults.get(name)
    }


def _read_object(url: str) -> dict[str, Any]:
    try:
        return read_settings(url, DataError)
    except (FileNotFoundError, NotADirectoryError):
        return {}
