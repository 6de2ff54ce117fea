"""Generates one PNG of one or more images from one dialog (`d2i sample`)."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2i import __version__
from d2i.corpora import RECORD_FIELDS, parse_record
from d2i.corpora.chat_forms import ASSISTANT
from d2i.corpora.json_stream import read_objects
from d2i.corpora.records import Dialog, RecordError
from d2i.dialog import Turn
from d2i.errors import DataError, GenerationError
from d2i.eval.loaded_model import Model
from d2i.eval.prompts import Prompt
from d2i.images.decode import png_bytes
from d2i.io import storage
from d2i.prompt_text import Role, turn_roles


def read_dialog(text: str) -> list[Turn]:
    """Read a dialog: plain lines (one turn each, by alternating speakers), or JSON.

    JSON is a list of turns, or a single turn: a string, or `{"speaker": 0, "text": "…"}`. It may
    also be one record in any format of a supported corpus, or the list of its messages. All turns
    of a record are read; its images are ignored.

    Raises:
        DataError: If it contains no text, or the JSON has another form.
    """
    if text.lstrip().startswith(("[", "{")):
        record = _read_record(text)
        turns = _read_json(text) if record is None else _turns_of(record)
    else:
        turns = [Turn(None, line.strip()) for line in text.splitlines() if line.strip()]
    if not any(turn.text.strip() for turn in turns):
        raise DataError("the dialog is empty; expected one turn per line, or a JSON list of turns")
    return turns


def read_roles(text: str) -> list[Role]:
    """Return the role of each turn of a dialog, for a network that reads chats.

    A record says who shares an image: the speaker of its last one or, if it shows none, the
    assistant of its messages. All turns of other dialogs are the user's.

    Args:
        text: The dialog, as `read_dialog` reads it.
    """
    speakers = [turn.speaker for turn in read_dialog(text)]
    record = _read_record(text) if text.lstrip().startswith(("[", "{")) else None
    own_turn = None
    if record is not None:
        images = _dialog_of(record).images
        has_roles = bool({"messages", "conversations"} & record.keys())
        if images:
            own_turn = images[-1].turn
        elif has_roles and ASSISTANT in speakers:
            own_turn = speakers.index(ASSISTANT)
    return turn_roles(speakers, own_turn)


def generate_image(
    model: Model,
    turns: Sequence[Turn],
    seeds: Sequence[int],
    out: str,
    *,
    key: str | None = None,
    roles: Sequence[Role] = (),
) -> str:
    """Generate the images for a dialog as one PNG, with the settings in its metadata.

    Several images are laid out in a grid, row by row. The same dialog, key and seed give the same
    image, alone or in a grid; with an instance's key, the image that `d2i eval` generates.

    Args:
        model: The system.
        turns: The dialog.
        seeds: One image is generated for each.
        out: The PNG, a path or a URL.
        key: Keys the noise together with the seed; None uses the linearized text.
        roles: The role of each turn in a chat; empty for all the user's.

    Returns:
        The linearized text.

    Raises:
        GenerationError: If a pipeline withholds an image, or one is not finite.
    """
    prompt = model.prompt(turns, key, roles)
    found = model.generate_prompts([prompt] * len(seeds), seeds)
    pixels = [generation.pixels for generation in found if generation.pixels is not None]
    if len(pixels) < len(found):
        raise GenerationError(next(g.reason for g in found if g.pixels is None))
    metadata = image_metadata(model, prompt, seeds)
    storage.write_bytes(out, png_bytes(grid(np.stack(pixels)), metadata))
    return prompt.text


def image_metadata(model: Model, prompt: Prompt, seeds: Sequence[int]) -> dict[str, str]:
    """Return the text chunks of a PNG that say how its images were generated.

    Args:
        model: The system.
        prompt: The dialog, from `Model.prompt`.
        seeds: The seed of each image.
    """
    recipe = model.recipe
    settings = recipe.sample.model_dump(exclude={"seed", "weights"}) | {
        "weights_kind": recipe.sample.weights,
        "recipe": recipe.name,
        "text": prompt.text,
        "key": prompt.key,
        "seed": " ".join(map(str, seeds)),
        "weights": model.weights,
        "d2i": __version__,
    }
    return {name: str(value) for name, value in settings.items()}


def grid(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Arrange images in a nearly square grid; unused cells of the last row are black.

    Args:
        pixels: uint8 (N, H, W, 3).

    Returns:
        uint8 (rows * H, columns * W, 3).
    """
    num, height, width, _ = pixels.shape
    columns = math.ceil(math.sqrt(num))
    num_rows = math.ceil(num / columns)
    cells = np.zeros((num_rows * columns, height, width, 3), np.uint8)
    cells[:num] = pixels
    laid_out = cells.reshape(num_rows, columns, height, width, 3).swapaxes(1, 2)
    return laid_out.reshape(num_rows * height, columns * width, 3)


def _read_record(text: str) -> dict[str, Any] | None:
    """Return the one record of a JSON text, or a record of the messages it lists, or None."""
    if (listed := _listed_messages(text)) is not None:
        return {"messages": listed}
    records = [
        record
        for _, record in read_objects(io.BytesIO(text.encode()), "the dialog", lambda _: None)
        if isinstance(record, dict) and RECORD_FIELDS & set(record)
    ]
    if len(records) > 1:
        raise DataError(
            f"the dialog: got {len(records)} records of a corpus; expected one; keep only the "
            "record to generate images for"
        )
    return records[0] if records else None


def _listed_messages(text: str) -> list[Any] | None:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_list = isinstance(values, list) and values and all(isinstance(v, dict) for v in values)
    return values if is_list and all({"role", "from"} & set(value) for value in values) else None


def _turns_of(record: dict[str, Any]) -> list[Turn]:
    return list(_dialog_of(record).turns)


def _dialog_of(record: dict[str, Any]) -> Dialog:
    """Read a record; text that cannot be read is an error, an image is not."""

    def refuse(reason: str, detail: str) -> None:
        if reason not in ("bad_image_ref", "no_image"):
            raise DataError(f"the dialog: {detail} ({reason}); fix it")

    try:
        return parse_record(record, refuse)
    except RecordError as err:
        raise DataError(f"the dialog: {err.detail} ({err.reason}); fix it") from err


def _read_json(text: str) -> list[Turn]:
    try:
        values = json.loads(text)
        return [_turn(value) for value in (values if isinstance(values, list) else [values])]
    except (ValueError, TypeError, RecursionError) as err:
        raise DataError(
            f"the dialog is not a list of turns: {err}; expected a JSON list of strings or of "
            '{"speaker": 0, "text": "…"}'
        ) from err


def _turn(value: Any) -> Turn:
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise TypeError(f"got the turn {value!r}")
    # Raises UnicodeEncodeError for a lone surrogate, which JSON can express and UTF-8 cannot.
    value["text"].encode()
    speaker = value.get("speaker")
    if speaker is not None and not isinstance(speaker, int):
        raise TypeError(f"got the speaker {speaker!r}")
    return Turn(speaker, value["text"])
