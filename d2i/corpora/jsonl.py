"""A team's own chats: `{train,valid,test}.jsonl`, one conversation an object.

Two forms, which may be mixed. The plain one:

    {"id": "7", "turns": [{"speaker": 0, "text": "See?", "images": ["photos/1.jpg"]}, ...]}

`id` is a text or a whole number, unique within its file. `speaker` (0 to 127) may be left out:
turns then alternate. `text` may be left out beside pictures. A picture is an http or https
address, or a path below the source with `/` between its parts.

The chat-completion form:

    {"id": "7", "messages": [{"role": "user", "content": "See?"},
                             {"role": "assistant", "content": [
                                 {"type": "text", "text": "Here"},
                                 {"type": "image_url", "image_url": {"url": "photos/1.jpg"}}]}]}

`user` is speaker 0 and `assistant` speaker 1; messages of other roles (system, tool, ...) are
counted but say nothing, and their pictures are no instances. Must not import torch.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from d2i import storage
from d2i.corpora.layout import SPLITS
from d2i.corpora.records import (
    Dialog,
    Flaw,
    Picture,
    RecordError,
    field,
    image_ref_of,
    optional_field,
    speaker_of,
    turns_of,
    typed,
)
from d2i.dialog import Direction, Turn

_SPEAKERS = {"user": 0, "assistant": 1}


@dataclass(frozen=True, kw_only=True)
class Jsonl:
    """How a team's own chats become instances: one for each picture."""

    direction: Direction = "answer"
    """`answer`: the context ends with the picture's turn. `first`: the picture opens, the context
    is what is said after its turn."""

    id_field: ClassVar[str] = "id"

    def files(self, source: str, split: str) -> list[str]:
        """List the split's file, relative to the source."""
        names = (f"{name}.jsonl" for name in SPLITS[split])
        present = (name for name in names if storage.exists(storage.join(source, name)))
        return list(itertools.islice(present, 1))

    def parser(self, source: str, split: str) -> Callable[[dict[str, Any], Flaw], Dialog]:
        """Return what parses one record; source and split do not matter here."""
        del source, split
        return _parse

    def context(self, turns: tuple[Turn, ...], turn: int) -> tuple[Turn, ...]:
        """Return the turns that a picture in this turn answers, or opens."""
        return turns[: turn + 1] if self.direction == "answer" else turns[turn + 1 :]

    def is_unique(self, split: str) -> bool:
        """Keep every occurrence of a picture."""
        del split
        return False


def _parse(record: dict[str, Any], flaw: Flaw) -> Dialog:
    name, read = ("turns", _read_turn) if "turns" in record else ("messages", _read_message)
    turns, pictures = [], []
    for index, entry in enumerate(turns_of(record, name)):
        turn, images = read(entry, f"turn {index}")
        turns.append(turn)
        for image, value in enumerate(images):
            try:
                pictures.append(Picture(index, image, image_ref_of(value)))
            except RecordError as error:
                flaw(error.reason, f"turn {index} image {image}: {error.detail}")
    return Dialog(tuple(turns), tuple(pictures))


def _read_turn(entry: object, at: str) -> tuple[Turn, list[str]]:
    fields = typed(entry, dict, at)
    images = optional_field(fields, "images", list, at) or []
    text = optional_field(fields, "text", str, at) if images else field(fields, "text", str, at)
    speaker = None if fields.get("speaker") is None else speaker_of(fields, "speaker", at)
    return Turn(speaker, text or ""), [typed(image, str, f"{at} image") for image in images]


def _read_message(entry: object, at: str) -> tuple[Turn, list[str]]:
    fields = typed(entry, dict, at)
    speaker = _SPEAKERS.get(field(fields, "role", str, at))
    if speaker is None:
        return Turn(None, ""), []
    content = fields.get("content")
    if isinstance(content, list):
        text, images = _read_parts(content, at)
    else:
        text, images = optional_field(fields, "content", str, at) or "", []
    return Turn(speaker, text), images


def _read_parts(parts: list[Any], at: str) -> tuple[str, list[str]]:
    texts, images = [], []
    for part in parts:
        kind = field(part, "type", str, f"{at} part")
        if kind == "text":
            texts.append(field(part, "text", str, f"{at} part"))
        elif kind == "image_url":
            address = field(part, "image_url", dict, f"{at} part")
            images.append(field(address, "url", str, f"{at} part"))
        else:
            raise RecordError("wrong_type", f"{at} part: expected type text or image_url")
    return " ".join(texts), images
