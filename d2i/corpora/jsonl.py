"""A team's own chats: `{train,valid,test}.jsonl`, one conversation an object.

Two forms, which may be mixed. The plain one:

    {"id": "7", "turns": [{"speaker": 0, "text": "See?", "images": ["photos/1.jpg"]}, ...]}

`id` is a text or a whole number, unique within its file; without one a conversation is named by a
hash of what was read of it, so that equal ones are duplicates. `speaker` (0 to 127, or a name) may
be left out: turns then alternate. Names are numbered in their order within the conversation.
`text` may be left out beside pictures. A picture is an http or https address, or a path below the
source with `/` between its parts. Other fields are passed over, but for one that is named nearly
like a field that is not there.

The chat-completion form:

    {"id": "7", "messages": [{"role": "user", "content": "See?"},
                             {"role": "assistant", "content": [
                                 {"type": "text", "text": "Here"},
                                 {"type": "image_url", "image_url": {"url": "photos/1.jpg"}}]}]}

The address may stand for its object: `"image_url": "photos/1.jpg"`, and a part may be
`{"type": "image", "image": "photos/1.jpg"}`. `user` or `human` is speaker 0; `assistant`, `bot`,
`model` or `gpt` is speaker 1, in any case. Messages of `system`, `developer`, `tool` and `function`
are counted as turns but are nobody's: they get no mark, and their pictures are no instances. So are
those of other roles, and parts of other types are left out; both are problems. Must not import
torch.
"""

import hashlib
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
    Name,
    Picture,
    RecordError,
    Speaker,
    Text,
    Turns,
    image_ref_of,
)
from d2i.dialog import NOBODY, Turn

_SPEAKERS = {"user": 0, "human": 0, "assistant": 1, "bot": 1, "model": 1, "gpt": 1}
_SILENT = frozenset({"system", "developer", "tool", "function"})
_MAX_SPEAKERS = 128
_ID_DIGITS = 20
"""Of a hash: 80 bits, of which no two are alike among any number of conversations (ours)."""


class _Turn(Struct, gc=False):
    text: Text | None = None
    speaker: Speaker | Name | None = None
    images: list[str] | None = None


class _Message(Struct, gc=False):
    role: str
    content: Any = None
    """Typed where it is read, as that of a silent role may be anything."""


class JsonlRecord(Struct, gc=False):
    """One conversation, in either form."""

    id: DialogId | None = None
    turns: Turns[_Turn] | None = None
    messages: Turns[_Message] | None = None


class _Address(Struct, gc=False):
    url: str


_Content = Text | list[dict[str, Any]] | None
_PARTS: dict[Any, Any] = {"text": Text, "image_url": _Address | str, "image": str}
"""What each type of part holds under its own name."""


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
    record = _typed(fields, JsonlRecord)
    if record.turns is None and record.messages is None:
        detail = misspelt(fields, ("turns", "messages")) or "expected one of them"
        raise RecordError("missing_field", f"turns: missing, and so is messages; {detail}")
    if stray := next(_misspelt(fields), None):
        flaw("unknown_field", stray)
    turns, pictures = [], []
    for index, (turn, images) in enumerate(_read(record, flaw)):
        turns.append(turn)
        for image, value in enumerate(images):
            try:
                pictures.append(Picture(index, image, image_ref_of(value)))
            except RecordError as error:
                flaw(error.reason, f"turn {index} image {image}: {error.detail}")
    number = _hash_of(turns, pictures) if record.id is None else str(record.id)
    return Dialog(number, tuple(turns), tuple(pictures))


def _typed(value: Any, kind: Any, where: str = "") -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as err:
        error = RecordError.of(err)
        raise RecordError(error.reason, f"{where}{error.detail}") from err


def _hash_of(turns: list[Turn], pictures: list[Picture]) -> str:
    """Name a conversation by what was read of it."""
    return hashlib.sha256(msgspec.json.encode([turns, pictures])).hexdigest()[:_ID_DIGITS]


def _misspelt(fields: dict[str, Any]) -> Iterator[str]:
    """Describe the fields of a sound record's turns and parts that are misspelt."""
    for form, kind in (("turns", _Turn), ("messages", _Message)):
        for index, turn in enumerate(fields.get(form) or ()):
            for part in _parts_of(turn) if form == "messages" else ():
                if detail := misspelt(part, ("type", *_PARTS)):
                    yield f"turn {index} part: {detail}"
            if detail := misspelt(turn, kind.__struct_fields__):
                yield f"turn {index}: {detail}"


def _parts_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    """List the parts that are looked at: of a message of somebody, and objects."""
    parts = message.get("content")
    if not isinstance(parts, list) or message["role"].lower() in _SILENT:
        return []
    return [part for part in parts if isinstance(part, dict)]


def _read(record: JsonlRecord, flaw: Flaw) -> list[tuple[Turn, list[str]]]:
    """Return every turn with its pictures as the record names them."""
    if record.turns and record.messages:
        raise RecordError("wrong_type", "turns and messages: got both, expected one of them")
    if record.messages:
        return [
            _read_message(message, index, flaw) for index, message in enumerate(record.messages)
        ]
    return _read_turns(record.turns or [])


def _read_turns(turns: list[_Turn]) -> list[tuple[Turn, list[str]]]:
    numbers = _numbers([turn.speaker for turn in turns])
    read = []
    for index, (turn, speaker) in enumerate(zip(turns, numbers, strict=True)):
        if turn.text is None and not turn.images:
            raise RecordError("missing_field", f"turn {index}: neither text nor images")
        read.append((Turn(speaker, turn.text or ""), turn.images or []))
    return read


def _numbers(speakers: list[int | str | None]) -> list[int | None]:
    """Number speakers that have names, in the order in which they come."""
    names = list(dict.fromkeys(name for name in speakers if isinstance(name, str)))
    if names and any(isinstance(number, int) for number in speakers):
        raise RecordError("wrong_type", "speaker: got names and numbers, expected one of them")
    if len(names) > _MAX_SPEAKERS:
        detail = f"speaker: got {len(names)} names, expected at most {_MAX_SPEAKERS}"
        raise RecordError("too_large", detail)
    number_of = {name: number for number, name in enumerate(names)}
    return [number_of[name] if isinstance(name, str) else name for name in speakers]


def _read_message(message: _Message, index: int, flaw: Flaw) -> tuple[Turn, list[str]]:
    role = message.role.lower()
    if (speaker := _SPEAKERS.get(role)) is not None:
        content = _typed(message.content, _Content, f"turn {index}: ")
        if isinstance(content, list):
            text, images = _read_parts(content, index, flaw)
            return Turn(speaker, text), images
        return Turn(speaker, content or ""), []
    if role not in _SILENT:
        if message.content:
            detail = f"got role {role[:20]!r}, expected user or assistant; it is left out"
            flaw("wrong_type", f"turn {index}: {detail}")
    elif _shows_picture(message.content):
        flaw("no_image", f"turn {index}: a picture of role {role[:20]!r} is none")
    return Turn(NOBODY, ""), []


def _shows_picture(content: Any) -> bool:
    parts = content if isinstance(content, list) else ()
    return any(
        isinstance(part, dict) and (part.get("image_url") or part.get("image")) for part in parts
    )


def _read_parts(parts: list[dict[str, Any]], index: int, flaw: Flaw) -> tuple[str, list[str]]:
    """Return the text and the pictures of parts; those of unknown types are left out and told."""
    texts: list[str] = []
    images: list[str] = []
    for part in parts:
        kind = part.get("type")
        if not isinstance(kind, str) or kind not in _PARTS:
            detail = f"got type {str(kind)[:20]!r}, expected {', '.join(_PARTS)}; it is left out"
            flaw("unknown_field", f"turn {index} part: {detail}")
        elif part.get(kind) is None:
            flaw("missing_field", f"turn {index} part: its {kind} is missing; it is left out")
        else:
            value = _typed(part[kind], _PARTS[kind], f"turn {index} part: ")
            held = value.url if isinstance(value, _Address) else value
            (texts if kind == "text" else images).append(held)
    return " ".join(texts), images
