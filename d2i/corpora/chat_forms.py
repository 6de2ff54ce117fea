"""Formats of custom chats: `turns`, `messages`, and ShareGPT's `conversations`.

`turns` holds the text, speaker and images of each turn. `messages` (OpenAI, TRL, LLaMA-Factory,
ms-swift) and `conversations` (ShareGPT, LLaVA) hold `role` and `content`, or `from` and `value`.
Their images are in parts of the content, in the message's own `images`, or in the record's `images`
or `image`. The record's images are assigned in order, one to each mark `<image>` in a text and each
part `{"type": "image"}`. A field named almost like one that the record lacks is reported as a
likely typo; other unknown fields are custom data and are ignored. Must not import torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from d2i.corpora.records import DialogId, Name, RecordError, ReportIssue, Speaker, Text, Turns
from d2i.dialog import NO_SPEAKER, Turn

FORMS = ("turns", "messages", "conversations")
"""Formats, by name of the field that holds the turns; a record has one of these fields."""
IMAGE_MARK = "<image>"
"""Mark in a text for the next image of a record that lists its images."""

ASSISTANT = 1
"""The speaker of the messages whose role is the assistant's."""
_SPEAKERS = {"user": 0, "human": 0} | dict.fromkeys(("assistant", "bot", "model", "gpt"), ASSISTANT)
_SILENT = frozenset({"system", "developer", "tool", "function", "function_call", "observation"})
_MAX_SPEAKERS = 128
_MAX_IMAGES = 1 << 14
_Content = Text | list[dict[str, Any]] | None
_Listed = Annotated[list[str | dict[str, Any]], Meta(max_length=_MAX_IMAGES)]
_PART_FIELDS = ("text", "image_url", "image")
_MIN_SIMILARITY = 0.8
"""Similarity from which a name is a likely typo: `image` of `images`, `speaker_id` of `speaker`."""


class _Turn(Struct, gc=False):
    text: Text | None = None
    speaker: Speaker | Name | None = None
    images: list[str] | None = None


class _Message(Struct, gc=False, rename={"sender": "from"}):
    role: str | None = None
    content: Any = None
    """Type-checked when it is read, because that of a silent role may be anything."""
    sender: str | None = None
    value: Any = None
    images: Any = None
    image: Any = None


class ChatRecord(Struct, gc=False):
    """One conversation, in any of the formats."""

    id: DialogId | None = None
    turns: Turns[_Turn] | None = None
    messages: Turns[_Message] | None = None
    conversations: Turns[_Message] | None = None
    images: Any = None
    image: Any = None


class _Address(Struct, gc=False):
    url: str


_PARTS: dict[Any, tuple[tuple[str, ...], Any]] = {
    "text": (("text",), Text),
    "image_url": (("image_url",), _Address | str),
    "image": (("image", "url", "path"), str),
    "input_text": (("text",), Text),
    "output_text": (("text",), Text),
    "input_image": (("image_url",), _Address | str),
}
"""Fields that may hold the content of each type of part, and the content's type. The last three
types are from OpenAI's Responses API."""


def parse_chat(
    fields: dict[str, Any], report_issue: ReportIssue
) -> tuple[str | None, list[tuple[Turn, list[str]]]]:
    """Read one conversation in any of the formats.

    Args:
        fields: The record.
        report_issue: Called for each part that is left out while the rest of the record is used.

    Returns:
        The record's own id, and every turn with its images as the record names them.

    Raises:
        RecordError: If the record is in none of the formats, or cannot be used.
    """
    record = _typed(fields, ChatRecord)
    if all(getattr(record, form) is None for form in FORMS):
        detail = misspelt(fields, FORMS) or "expected one of them"
        others = " and ".join(FORMS[1:])
        raise RecordError("missing_field", f"{FORMS[0]}: missing, and so are {others}; {detail}")
    if stray := next(_misspelt(fields), None):
        report_issue("unknown_field", stray)
    number = None if record.id is None else str(record.id)
    return number, _read(record, report_issue)


def _typed(value: Any, kind: Any, where: str = "") -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as err:
        error = RecordError.of(err)
        raise RecordError(error.reason, f"{where}{error.detail}") from err


def _misspelt(fields: dict[str, Any]) -> Iterator[str]:
    """Yield a description of each misspelt field in the turns and parts of a sound record."""
    for form in FORMS:
        kind = _Turn if form == "turns" else _Message
        for index, turn in enumerate(fields.get(form) or ()):
            for part in _parts_of(turn) if kind is _Message else ():
                if detail := misspelt(part, ("type", *_PART_FIELDS)):
                    yield f"turn {index} part: {detail}"
            if detail := misspelt(turn, kind.__struct_encode_fields__):
                yield f"turn {index}: {detail}"


def _parts_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    """List the parts that are checked: objects, in messages of a role that is not silent."""
    parts = message.get("content")
    role = message.get("role") or message.get("from") or ""
    if not isinstance(parts, list) or role.lower() in _SILENT:
        return []
    return [part for part in parts if isinstance(part, dict)]


def _read(record: ChatRecord, report_issue: ReportIssue) -> list[tuple[Turn, list[str]]]:
    """Return every turn with its images as the record names them."""
    given = [form for form in FORMS if getattr(record, form)]
    if len(given) > 1:
        raise RecordError("wrong_type", f"{' and '.join(given)}: got both, expected one of them")
    messages = record.messages or record.conversations
    if messages:
        return _read_messages(messages, _listed(record, ""), report_issue)
    if _listed(record, ""):
        report_issue(
            "unknown_field",
            "images: got them beside 'turns', expected them in the turn that shows them; they are "
            "left out",
        )
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
    """Number speakers that have names, in order of appearance."""
    names = list(dict.fromkeys(name for name in speakers if isinstance(name, str)))
    if names and any(isinstance(number, int) for number in speakers):
        raise RecordError("wrong_type", "speaker: got names and numbers, expected one of them")
    if len(names) > _MAX_SPEAKERS:
        detail = f"speaker: got {len(names)} names, expected at most {_MAX_SPEAKERS}"
        raise RecordError("too_large", detail)
    number_of = {name: number for number, name in enumerate(names)}
    return [number_of[name] if isinstance(name, str) else name for name in speakers]


def _listed(holder: ChatRecord | _Message, where: str) -> list[str] | None:
    """Return the images that a record or a message lists beside its text; None for no list."""
    listed = holder.images if holder.images is not None else holder.image
    if listed is None:
        return None
    if isinstance(listed, str | dict):
        listed = [listed]
    return [
        _path_of(entry, f"{where}images[{index}]")
        for index, entry in enumerate(_typed(listed, _Listed, f"{where}images: "))
    ]


def _path_of(entry: str | dict[str, Any], where: str) -> str:
    """Return the path or URL of a listed image: the entry itself, or its `url` or `path`."""
    if isinstance(entry, str):
        return entry
    for name in ("url", "path"):
        if isinstance(place := entry.get(name), str):
            return place
    raise RecordError(
        "wrong_type", f"{where}: expected a path or a URL, or an object with 'path' or 'url'"
    )


class _Marked:
    """Images listed beside messages, assigned in order, one to each mark."""

    def __init__(self, listed: list[str] | None) -> None:
        self.listed = listed or []
        self.has_list = listed is not None
        self.num_marks = 0

    def take(self, num_marks: int) -> list[str]:
        """Return the images of the next `num_marks` marks; fewer at the end of the list."""
        taken = self.listed[self.num_marks : self.num_marks + num_marks]
        self.num_marks += num_marks
        return taken

    def split(self, text: str) -> tuple[str, list[str]]:
        """Return a text without its marks, and the images that they stand for."""
        if not self.has_list or IMAGE_MARK not in text:
            return text, []
        pieces = text.split(IMAGE_MARK)
        spoken = " ".join(filter(None, (piece.strip() for piece in pieces)))
        return spoken, self.take(len(pieces) - 1)

    def check(self, where: str) -> None:
        """Check that there are as many marks as images, as otherwise their turns are unknown.

        Raises:
            RecordError: `mismatched_images`.
        """
        if self.num_marks != len(self.listed):
            raise RecordError(
                "mismatched_images",
                f"{where}images: got {len(self.listed)}, but {self.num_marks} marks {IMAGE_MARK}; "
                "expected one mark for each image, where it is shown",
            )


def _read_messages(
    messages: list[_Message], listed: list[str] | None, report_issue: ReportIssue
) -> list[tuple[Turn, list[str]]]:
    marked = _Marked(listed)
    read = [_read_message(message, n, marked, report_issue) for n, message in enumerate(messages)]
    if listed and not marked.num_marks and any(images for _, images in read):
        detail = f"images: got {len(listed)} but no mark {IMAGE_MARK}; they are left out"
        report_issue("unknown_field", detail)
    else:
        marked.check("")
    return read


def _read_message(
    message: _Message, index: int, marked: _Marked, report_issue: ReportIssue
) -> tuple[Turn, list[str]]:
    where = f"turn {index}: "
    name = message.role if message.role is not None else message.sender
    if name is None:
        raise RecordError("missing_field", f"{where}both role and from are missing")
    content = message.content if message.content is not None else message.value
    role = name.lower()
    own = _listed(message, where)
    if (speaker := _SPEAKERS.get(role)) is not None:
        if own:
            marked = _Marked(own)
        text, images = _read_content(content, index, marked, report_issue)
        if not own:
            return Turn(speaker, text), images
        if marked.num_marks:
            marked.check(where)
            return Turn(speaker, text), images
        return Turn(speaker, text), images + own
    if role not in _SILENT and (content or own):
        detail = f"got role {name[:20]!r}, expected user or assistant; it is left out"
        report_issue("wrong_type", f"{where}{detail}")
    marked_here = marked.take(_num_marks(content)) if marked.has_list else []
    if role in _SILENT and (own or marked_here or _shows_image(content)):
        report_issue("no_image", f"{where}images of role {name[:20]!r} are not used")
    return Turn(NO_SPEAKER, ""), []


def _num_marks(content: Any) -> int:
    """Count the marks of a message that is not used, so that later marks get their images."""
    if isinstance(content, str):
        return content.count(IMAGE_MARK)
    parts = (
        [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    )
    return sum(
        _num_marks(part.get("text")) + (part.get("type") == "image" and not _shows_image([part]))
        for part in parts
    )


def _shows_image(content: Any) -> bool:
    parts = content if isinstance(content, list) else ()
    return any(
        isinstance(part, dict) and (part.get("image_url") or part.get("image")) for part in parts
    )


def _read_content(
    content: Any, index: int, marked: _Marked, report_issue: ReportIssue
) -> tuple[str, list[str]]:
    content = _typed(content, _Content, f"turn {index}: ")
    if isinstance(content, list):
        return _read_parts(content, index, marked, report_issue)
    return marked.split(content or "")


def _read_parts(
    parts: list[dict[str, Any]], index: int, marked: _Marked, report_issue: ReportIssue
) -> tuple[str, list[str]]:
    """Return the text and images of parts; parts of unknown types are reported and left out."""
    texts: list[str] = []
    images: list[str] = []
    where = f"turn {index} part: "
    for part in parts:
        kind = part.get("type")
        if not isinstance(kind, str) or kind not in _PARTS:
            detail = f"got type {str(kind)[:20]!r}, expected {', '.join(_PARTS)}; it is left out"
            report_issue("unknown_field", f"{where}{detail}")
            continue
        names, held_kind = _PARTS[kind]
        held = next((part[name] for name in names if part.get(name) is not None), None)
        if held is None and kind == "image" and marked.has_list:
            images += marked.take(1)
        elif held is None:
            report_issue("missing_field", f"{where}its {names[0]} is missing; it is left out")
        elif held_kind is Text:
            spoken, shown = marked.split(_typed(held, Text, where))
            images += shown
            if spoken or not shown:
                texts.append(spoken)
        else:
            value = _typed(held, held_kind, where)
            images.append(value.url if isinstance(value, _Address) else value)
    return " ".join(texts), images


def misspelt(fields: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """Describe the first field of an object that is a likely typo of a name that it lacks."""
    for name, value in fields.items():
        near = None if value is None or name in names else _nearest(name, names)
        if near is not None and fields.get(near) is None:
            return f"got {name!r}, expected {near!r}"
    return None


@lru_cache(maxsize=1024)
def _nearest(name: str, names: tuple[str, ...]) -> str | None:
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=_MIN_SIMILARITY)
    return near[0] if near else None
