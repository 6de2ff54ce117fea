"""The published sizes of UniDiffuser, and what its loss asks of a recipe. Must not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from d2i.backbones import Presets

if TYPE_CHECKING:
    from d2i.config import Recipe

_SIZES: dict[str, Any] = {
    "latent_size": 64,
    "patch_size": 2,
    "dim": 1536,
    "depth": 30,
    "num_heads": 24,
    "text_dim": 64,
    "num_text_tokens": 77,
    "clip_dim": 512,
    "latent_scale": 0.18215,
    "gradient_checkpointing": False,
}


def _unset(recipe: Recipe) -> dict[str, Any]:
    """Fill in what guidance needs: the joint loss learns its unconditional half at t^y = T."""
    if recipe.train.unidiffuser.loss == "joint":
        return {"train.condition_dropout": 0.0}
    return {"sample.unconditional": "empty_token"}


def _problem(recipe: Recipe) -> str | None:
    if recipe.train.weighting != "none":
        return (
            f"train.weighting={recipe.train.weighting}: UniDiffuser's losses have no weighting; "
            "expected none"
        )
    is_learned = recipe.train.unidiffuser.loss != "joint" or recipe.train.condition_dropout > 0
    if is_learned or recipe.sample.unconditional != "empty_token":
        return None
    return (
        "sample.unconditional=empty_token uses the text of '', which the joint loss never trains "
        "on without train.condition_dropout; set that to 0.1, or keep "
        "sample.unconditional=true_uncond"
    )


PRESETS = Presets(
    {"unidiffuser-v0": _SIZES, "unidiffuser-v1": _SIZES}, unset=_unset, problem=_problem
)
