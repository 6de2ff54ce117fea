"""Generates one PNG of one or more images from one dialog (`d2i sample`)."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2i import __version__
from d2i.backbones import chat_problem, presets_of
from d2i.cluster import device_of_worker
from d2i.config import Recipe
from d2i.corpora import RECORD_FIELDS, parse_record
from d2i.corpora.chat_forms import ASSISTANT
from d2i.corpora.json_stream import read_objects
from d2i.corpora.records import Dialog, RecordError
from d2i.dialog import Turn
from d2i.encoders import Vae, load_clip_text
from d2i.errors import ConfigError, DataError
from d2i.eval.prompts import Prompt
from d2i.eval.sampler import Sampler
from d2i.eval.system import SystemSpec
from d2i.eval.systems import parse_system
from d2i.eval.systems.fine_tuned_pipeline import FineTunedPipeline
from d2i.images.decode import png_bytes
from d2i.io import storage
from d2i.models.registry import family_of_backbone
from d2i.prompt_text import Message, Role, context_messages, context_text, text_tokens, turn_roles


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


@dataclass(frozen=True)
class Request:
    """One dialog, and the images to generate from it.

    Args:
        run_url: A finished run.
        recipe: Settings for linearizing the dialog and generating images.
        turns: The dialog.
        seeds: One image is generated for each.
        key: Keys the noise together with the seed; None uses the linearized text.
        roles: The role of each turn in a chat; empty for all the user's.
    """

    run_url: str
    recipe: Recipe
    turns: Sequence[Turn]
    seeds: Sequence[int]
    key: str | None = None
    roles: Sequence[Role] = ()


def generate_image(request: Request, out: str) -> str:
    """Generate the images for a dialog as one PNG, with the settings in its metadata.

    Several images are laid out in a grid, row by row. The same dialog, key and seed give the same
    image, alone or in a grid; with an instance's key, the image that `d2i eval` generates.

    Returns:
        The linearized text.

    Raises:
        ConfigError: If the network cannot read the chats of `text.format=chat`.
        DataError: If a pipeline withholds an image, or one is not finite.
    """
    recipe = request.recipe
    if problem := chat_problem(recipe):
        raise ConfigError(problem)
    text = context_text(request.turns, recipe.text)
    key = text if request.key is None else request.key
    spec = parse_system(f"run:{request.run_url}", None, recipe)
    is_pipeline = presets_of(spec.backbone.name).pipeline is not None
    pixels, weights = (_by_pipeline if is_pipeline else _by_sampler)(request, spec, text, key)
    settings = recipe.sample.model_dump(exclude={"seed", "weights"}) | {
        "weights_kind": recipe.sample.weights,
        "recipe": recipe.name,
        "text": text,
        "key": key,
        "seed": " ".join(map(str, request.seeds)),
        "weights": weights,
        "d2i": __version__,
    }
    metadata = {name: str(value) for name, value in settings.items()}
    storage.write_bytes(out, png_bytes(grid(pixels), metadata))
    return text


def _by_sampler(
    request: Request, spec: SystemSpec, text: str, key: str
) -> tuple[NDArray[np.uint8], str]:
    """Return the images (N, H, W, 3) of d2i's own sampler, and the sha256 of its weights."""
    device = device_of_worker()
    recipe, encoders = request.recipe, request.recipe.encoders
    clip_text = load_clip_text(encoders, device)
    tokens = [text_tokens(line, recipe.text) for line in (text, "")]
    # Shards store text latents as float16, so these are rounded likewise.
    latents = [
        clip_text.encode(row[None], encoders.compute_batch_size).astype(np.float16)
        for row in tokens
    ]
    vae = Vae(encoders.vae, encoders.vae_kind, device)
    vae.check_codec(family_of_backbone(spec.backbone.name).codec, spec.backbone.name)
    sampler = Sampler(spec.backbone, vae, recipe.sample, latents[1][0], device)
    num = len(request.seeds)
    pixels = sampler.generate([key] * num, np.repeat(latents[0], num, axis=0), request.seeds)
    return pixels, sampler.hash


def _by_pipeline(
    request: Request, spec: SystemSpec, text: str, key: str
) -> tuple[NDArray[np.uint8], str]:
    """Return the images (N, H, W, 3) of the run's pipeline, and the sha256 of what was trained."""
    system = FineTunedPipeline(spec, request.recipe, device_of_worker())
    messages: tuple[Message, ...] = ()
    if request.roles:
        messages = context_messages(request.turns, request.roles, request.recipe.text)
    prompt = Prompt(key, tuple(request.turns), text, messages)
    found = system.generate_seeded([prompt] * len(request.seeds), request.seeds)
    if reasons := [generation.reason for generation in found if generation.pixels is None]:
        raise DataError(
            f"got no image: {reasons[0]}; expected one; change the dialog or the --seed"
        )
    pixels = np.stack([g.pixels for g in found if g.pixels is not None])
    part = presets_of(spec.backbone.name).network_part
    return pixels, str(system.described.get("adapter", system.described[part]))


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
