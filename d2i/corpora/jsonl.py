"""A team's own chats: `{train,valid,test}.jsonl`, one conversation an object.

Two forms, which may be mixed. The plain one:

    {"id": "7", "turns": [{"speaker": 0, "text": "See?", "images": ["photos/1.jpg"]}, ...]}

`id` is a text or a whole number, unique within its file. `speaker` (0 to 127) may be left out:
turns then alternate. `text` may be left out beside pictures. A picture is an http or https
address, or a path below the source with `/` between its parts. Other fields are passed over, but
for one that is named nearly like a field that is not there.

The chat-completion form:

    {"id": "7", "messages": [{"role": "user", "content": "See?"},
                             {"role": "assistant", "content": [
                                 {"type": "text", "text": "Here"},
                                 {"type": "image_url", "image_url": {"url": "photos/1.jpg"}}]}]}

The address may stand for its object: `"image_url": "photos/1.jpg"`. `user` is speaker 0 and
`assistant` speaker 1; messages of other roles (system, tool, ...) are counted as turns but are
nobody's: they get no mark, and their pictures are no instances. Must not import torch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec
from msgspec import Struct

from d2i import storage
from d2i.corpora.instances import InstanceOptions
from d2i.corpora.layout import SPLITS, only_one
from d2i.corpora.misspelt import misspelt
from d2i.corpora.records import (
    Dialog,
    DialogId,
    Flaw,
    Picture,
    RecordError,
    Speaker,
    Text,
    Turns,
    image_ref_of,
)
from d2i.dialog import NOBODY, Turn

_SPEAKERS = {"user": 0, "assistant": 1}


class _Turn(Struct, gc=False):
    text: Text | None = None
    speaker: Speaker | None = None
    images: list[str] | None = None


class _Address(Struct, gc=False):
    url: str


class _Part(Struct, gc=False):
    type: str
    text: Text | None = None
    image_url: _Address | str | None = None


class _Message(Struct, gc=False):
    role: str
    content: Text | list[_Part] | None = None


class JsonlRecord(Struct, gc=False):
    """One conversation, in either form."""

    id: DialogId
    turns: Turns[_Turn] | None = None
    messages: Turns[_Message] | None = None


@dataclass(frozen=True, kw_only=True)
class Jsonl(InstanceOptions):
    """How a team's own chats become instances: one for each picture."""

    record_type: ClassVar[type[dict[str, Any]]] = dict

    def files(self, source: str, split: str) -> list[str]:
        """List the split's file, relative to the source."""
        names = (f"{name}.jsonl" for name in SPLITS[split])
        present = [name for name in names if storage.exists(storage.join(source, name))]
        return [only_one(present, source)] if present else []

    def parser(self, source: str, split: str) -> Callable[[dict[str, Any], Flaw], Dialog]:
        """Return what parses one record; source and split do not matter here."""
        del source, split
        return _parse


def _parse(fields: dict[str, Any], flaw: Flaw) -> Dialog:
    try:
        record = msgspec.convert(fields, JsonlRecord)
    except msgspec.ValidationError as error:
        raise RecordError.of(error) from error
    if (detail := next(_misspelt(fields), None)) is not None:
        flaw("unknown_field", detail)
    turns, pictures = [], []
    for index, (turn, images) in enumerate(_read(record, flaw)):
        turns.append(turn)
        for image, value in enumerate(images):
            try:
                pictures.append(Picture(index, image, image_ref_of(value)))
            except RecordError as error:
                flaw(error.reason, f"turn {index} image {image}: {error.detail}")
    return Dialog(str(record.id), tuple(turns), tuple(pictures))


def _misspelt(fields: dict[str, Any]) -> Iterator[str]:
    """Describe the fields of a sound record that are misspelt."""
    if detail := misspelt(fields, JsonlRecord):
        yield detail
    for form, kind in (("turns", _Turn), ("messages", _Message)):
        for index, turn in enumerate(fields.get(form) or ()):
            parts = turn.get("content") if form == "messages" else None
            for part in parts if isinstance(parts, list) else ():
                if detail := misspelt(part, _Part):
                    yield f"turn {index} part: {detail}"
            if detail := misspelt(turn, kind):
                yield f"turn {index}: {detail}"


def _read(record: JsonlRecord, flaw: Flaw) -> list[tuple[Turn, list[str]]]:
    """Return every turn with its pictures as the record names them."""
    if record.turns and record.messages:
        raise RecordError("wrong_type", "turns and messages: got both, expected one of them")
    if record.messages:
        return [
            _read_message(message, index, flaw) for index, message in enumerate(record.messages)
        ]
    if record.turns is None and record.messages is None:
        detail = "turns: missing, and so is messages; expected one of them"
        raise RecordError("missing_field", detail)
    return [_read_turn(turn, index) for index, turn in enumerate(record.turns or ())]


def _read_turn(turn: _Turn, index: int) -> tuple[Turn, list[str]]:
    if turn.text is None and not turn.images:
        raise RecordError("missing_field", f"turn {index}: neither text nor images")
    return Turn(turn.speaker, turn.text or ""), turn.images or []


def _read_message(message: _Message, index: int, flaw: Flaw) -> tuple[Turn, list[str]]:
    speaker = _SPEAKERS.get(message.role)
    if speaker is None:
        if isinstance(message.content, list) and any(part.image_url for part in message.content):
            flaw("no_image", f"turn {index}: a picture of role {message.role[:20]!r} is none")
        return Turn(NOBODY, ""), []
    if isinstance(message.content, list):
        text, images = _read_parts(message.content, index)
        return Turn(speaker, text), images
    return Turn(speaker, message.content or ""), []


def _read_parts(parts: list[_Part], index: int) -> tuple[str, list[str]]:
    texts, images = [], []
    for part in parts:
        if part.type == "text" and part.text is not None:
            texts.append(part.text)
        elif part.type == "image_url" and part.image_url is not None:
            address = part.image_url
            images.append(address if isinstance(address, str) else address.url)
        elif part.type in ("text", "image_url"):
            raise RecordError("missing_field", f"turn {index} part: its {part.type} is missing")
        else:
            raise RecordError("wrong_type", f"turn {index} part: expected type text or image_url")
    return " ".join(texts), images
