"""Names that the shell completes."""

from __future__ import annotations

from collections.abc import Iterable

CORPORA = ("mmdialog", "photochat", "jsonl")
"""The names of `d2i.corpora.CORPORA`, whose import takes too long for a key press."""
SYSTEMS = ("run:", "diffusers:", "unclip:", "images:", "retrieve:", "divter:")
"""The kinds of systems of `d2i.eval.systems`, beside the backbones."""

SELECTED_SYSTEMS = ("run:", "diffusers:")
"""Those of them that `d2i select` takes, as they have a guidance scale."""


def complete_recipe(incomplete: str) -> list[str]:
    """Return the recipes that begin so."""
    from d2i.recipes import RECIPES

    return _beginning_with(incomplete, RECIPES)


def complete_corpus(incomplete: str) -> list[str]:
    """Return the corpora that begin so."""
    return _beginning_with(incomplete, CORPORA)


def complete_system(incomplete: str) -> list[str]:
    """Return the systems, or their kinds, that begin so."""
    from d2i.backbones import backbones

    return _beginning_with(incomplete, (*SYSTEMS, *backbones()))


def complete_selected_system(incomplete: str) -> list[str]:
    """Return the systems, or their kinds, that have a guidance scale and begin so."""
    from d2i.backbones import backbones

    return _beginning_with(incomplete, (*SELECTED_SYSTEMS, *backbones()))


def complete_metric(incomplete: str) -> list[str]:
    """Return the metrics that begin so."""
    from d2i.metric_specs import METRICS

    return _beginning_with(incomplete, METRICS)


def _beginning_with(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
