"""What a JSON record of a corpus turns into, and what is said of one that does not.

Owns `Problem`, the checks of single fields, and `Dialog`, the form that every corpus is parsed
to. Must not import torch.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from d2i.dialog import ImageRef, Turn

Reason = Literal[
    "bad_image_ref",
    "duplicate_dialog_id",
    "duplicate_key",
    "empty_context",
    "empty_file",
    "invalid_json",
    "invalid_utf8",
    "missing_field",
    "no_image",
    "too_large",
    "too_many_broken",
    "truncated",
    "wrong_type",
]

MAX_TURNS = 2048
"""A dialog with more turns is passed over: every picture repeats the turns before it."""

MAX_SPEAKER = 127

_T = TypeVar("_T")
_WEB_URL = re.compile(r"https?://[^\s\x00-\x1f]+", re.IGNORECASE)
# No scheme, drive, chained file system, home folder, backslash, wildcard or control character.
_PATH = re.compile(r"[^~:\\*?\[\]\x00-\x1f\x7f][^:\\*?\[\]\x00-\x1f\x7f]{0,1023}")


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in a corpus that gives no instance.

    `where` is the file, relative to the source, with line or byte offset; `detail` says what was
    got and expected, and quotes no message of the dialog.
    """

    reason: Reason
    where: str
    detail: str


Report = Callable[[Problem], None]
Flaw = Callable[[Reason, str], None]
"""Reports a part of a record that is left out, the rest of it being used."""


class RecordError(Exception):
    """A record that cannot be used at all. It becomes a `Problem` and never leaves this package."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason: Reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Picture:
    """One occurrence of a picture: its turn, its index among that turn's pictures, its place."""

    turn: int
    image: int
    ref: ImageRef


@dataclass(frozen=True, slots=True)
class Dialog:
    """A parsed record: all turns, silent ones too, and the pictures that can be asked for."""

    turns: tuple[Turn, ...]
    pictures: tuple[Picture, ...]
    description: str | None = None
    labels: tuple[str, ...] = ()


def typed(value: object, kind: type[_T], name: str) -> _T:
    """Return the value if it is exactly of this type (a bool is no int).

    Raises:
        RecordError: If it is not.
    """
    if type(value) is not kind:
        raise RecordError(
            "wrong_type", f"{name}: got {type(value).__name__}, expected {kind.__name__}"
        )
    return value


def field(record: object, name: str, kind: type[_T], at: str = "") -> _T:
    """Return a required field of a record; `at` says which part of the dialog the record is.

    Raises:
        RecordError: If the record is no object, or the field is missing or of another type.
    """
    fields: dict[str, Any] = typed(record, dict, at or "record")
    label = f"{at} {name}".lstrip()
    if name not in fields:
        raise RecordError("missing_field", f"{label}: missing, expected {kind.__name__}")
    return typed(fields[name], kind, label)


def optional_field(record: dict[str, Any], name: str, kind: type[_T], at: str = "") -> _T | None:
    """Return a field that may be missing or null.

    Raises:
        RecordError: If it is there and of another type.
    """
    return None if record.get(name) is None else field(record, name, kind, at)


def dialog_id_of(record: object, name: str) -> str:
    """Return a record's id, which may be a number or a text.

    Raises:
        RecordError: If the record is no object, or has no such id.
    """
    kind = int if isinstance(record, dict) and type(record.get(name)) is int else str
    return str(field(record, name, kind))


def turns_of(record: object, name: str) -> list[Any]:
    """Return a record's list of turns, each still unread.

    Raises:
        RecordError: If there is no such list, or it is longer than `MAX_TURNS`.
    """
    turns: list[Any] = field(record, name, list)
    if len(turns) > MAX_TURNS:
        raise RecordError("too_large", f"{name}: got {len(turns)} turns, at most {MAX_TURNS}")
    return turns


def speaker_of(record: object, name: str, at: str) -> int:
    """Return a required speaker number, 0 to 127.

    Raises:
        RecordError: If there is no such field, or its value is none of these numbers.
    """
    speaker = field(record, name, int, at)
    if not 0 <= speaker <= MAX_SPEAKER:
        raise RecordError("wrong_type", f"{at} {name}: expected 0 to {MAX_SPEAKER}")
    return speaker


def is_web_url(text: str) -> bool:
    """Say whether a text is an http or https address, without judging where it leads."""
    return _WEB_URL.fullmatch(text) is not None


def image_ref_of(text: str) -> ImageRef:
    """Return what a corpus says of a picture: a web address, or a path below the source.

    Raises:
        RecordError: If it is neither: another scheme, an absolute path, a path that climbs.
    """
    if is_web_url(text):
        return ImageRef("urls", (text,))
    parts = text.split("/")
    if not _PATH.fullmatch(text) or any(part in ("", ".", "..") for part in parts):
        raise RecordError(
            "bad_image_ref", "expected an http(s) address, or a plain path below the source"
        )
    return ImageRef("file", (text,))
