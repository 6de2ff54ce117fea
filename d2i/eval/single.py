"""One conversation to one PNG (`d2i sample`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from d2i import storage
from d2i.cluster import device_of_worker
from d2i.config import Recipe
from d2i.context import context_text, text_tokens
from d2i.dialog import Turn
from d2i.encoders import ClipText, Vae
from d2i.errors import DataError
from d2i.eval.sampler import Sampler
from d2i.eval.systems import parse_system
from d2i.pictures import png_bytes


def read_dialog(text: str) -> list[Turn]:
    """Read a conversation: plain lines (one turn each, speakers taking turns), or JSON.

    JSON is a list of turns, or one turn: a string, or `{"speaker": 0, "text": "…"}`.

    Raises:
        DataError: If there is no turn in it, or the JSON is of another form.
    """
    if text.lstrip().startswith(("[", "{")):
        turns = _read_json(text)
    else:
        turns = [Turn(None, line.strip()) for line in text.splitlines() if line.strip()]
    if not turns:
        raise DataError("the dialog is empty; expected a turn a line, or a JSON list of turns")
    return turns


def draw_dialog(run_dir: Path, recipe: Recipe, turns: list[Turn], out: Path) -> str:
    """Draw the picture that answers `turns` with a finished run, settings in its metadata.

    The noise is keyed by the text: the same conversation and seed give the same picture.

    Returns:
        The linearized text.
    """
    device = device_of_worker()
    encoders = recipe.encoders
    text = context_text(turns, recipe.text)
    clip_text = ClipText(encoders.clip_text, encoders.text_prefix, device)
    tokens = [text_tokens(line, recipe.text) for line in (text, "")]
    latents = [clip_text.encode(row[None], encoders.compute_batch_size)[0] for row in tokens]
    sampler = Sampler(
        parse_system(f"run:{run_dir}", None, recipe).backbone,
        Vae(encoders.vae, encoders.vae_kind, device),
        recipe.sample,
        latents[1],
        device,
    )
    pixels = sampler.draw([text], latents[0][None])[0]
    settings = recipe.sample.model_dump() | {"recipe": recipe.name, "text": text}
    metadata = {name: str(value) for name, value in settings.items()}
    storage.write_bytes(str(out), png_bytes(pixels, metadata))
    return text


def _read_json(text: str) -> list[Turn]:
    try:
        values = json.loads(text)
        return [_turn(value) for value in (values if isinstance(values, list) else [values])]
    except (ValueError, KeyError, TypeError) as err:
        raise DataError(
            f"the dialog is no list of turns: {err}; expected a JSON list of strings or of "
            '{"speaker": 0, "text": "…"}'
        ) from err


def _turn(value: Any) -> Turn:
    if isinstance(value, str):
        return Turn(None, value)
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise TypeError(f"a turn is {value!r}")
    speaker = value.get("speaker")
    if speaker is not None and not isinstance(speaker, int):
        raise TypeError(f"a speaker is {speaker!r}")
    return Turn(speaker, value["text"])
