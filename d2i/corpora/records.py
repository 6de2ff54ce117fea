"""Records of a corpus: the dialog that each is parsed to, or the issue that it has.

Owns `RecordIssue`, the types that the records of all corpora are declared with, and `Dialog`. Must
not import torch.
"""

import re
from collections.abc import Callable
from typing import Annotated, Literal, Self, TypeVar
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct

from d2i.dialog import ImageRef, Turn

Reason = Literal[
    "bad_image_ref",
    "duplicate_dialog_id",
    "empty_context",
    "empty_file",
    "invalid_json",
    "invalid_utf8",
    "mismatched_images",
    "missing_field",
    "no_image",
    "repaired",
    "too_large",
    "too_many_broken",
    "truncated",
    "unknown_field",
    "wrong_type",
]

MAX_TURNS = 2048
"""A dialog with more turns is passed over: every picture repeats the turns before it."""

_T = TypeVar("_T")
Turns = Annotated[list[_T], Meta(max_length=MAX_TURNS)]
Text = Annotated[str, Meta(max_length=1 << 16)]
"""What is said in a turn. Longer texts are no talk, and combining marks cost their square."""
Name = Annotated[str, Meta(max_length=1024)]
DialogId = int | Name
Speaker = Annotated[int, Meta(ge=0, le=127)]

_WEB_URL = re.compile(r"https?://[^\s\x00-\x1f]+", re.IGNORECASE)
# No home folder, backslash, wildcard or control character, and no leading '-', which a command
# would take for an option. Brackets and colons are of names as cameras and screens give them.
_PATH = re.compile(r"[^-~\\*?\x00-\x1f\x7f][^\\*?\x00-\x1f\x7f]{0,1023}")
# A scheme, a drive, or a chain of file systems.
_ELSEWHERE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:|.*::", re.DOTALL)


class RecordIssue(Struct, frozen=True, gc=False, omit_defaults=True):
    """Something in a corpus that gives no instance.

    `where` is the file, relative to the source, with line or byte offset; `detail` says what was
    got and expected, and quotes no message of the dialog. `num_records` is how many records may be
    lost by it, where a piece of a file had to be passed over.
    """

    reason: Reason
    where: str
    detail: str
    num_records: int = 1


Report = Callable[[RecordIssue], None]
Flaw = Callable[[Reason, str], None]
"""Reports a part of a record that is left out, the rest of it being used."""


class RecordError(Exception):
    """A record that cannot be used at all: it becomes a `RecordIssue` within this package."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason: Reason = reason
        self.detail = detail

    @classmethod
    def of(cls, error: msgspec.ValidationError) -> Self:
        """Return what a record's declared type says against it: the field, never its value."""
        detail = str(error)
        if "missing required field" in detail:
            return cls("missing_field", detail)
        return cls("too_large" if "of length" in detail else "wrong_type", detail)


class SharedImage(Struct, frozen=True, gc=False):
    """One occurrence of a picture: its turn, its index among that turn's pictures, its place."""

    turn: int
    image: int
    ref: ImageRef


class Dialog(Struct, frozen=True, gc=False):
    """A parsed record: all turns, silent ones too, and the pictures that can be asked for."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[SharedImage, ...]
    description: str | None = None
    labels: tuple[str, ...] = ()


def is_web_url(text: str) -> bool:
    """Say whether a text is an http or https address, without judging where it leads."""
    if _WEB_URL.fullmatch(text) is None:
        return False
    try:
        return bool(urlsplit(text).hostname)
    except ValueError:
        return False


def image_ref_of(text: str) -> ImageRef:
    """Return what a corpus says of a picture: a web address, or a path below the source.

    Raises:
        RecordError: If it is neither: another scheme, an absolute path, a path that climbs.
    """
    if is_web_url(text):
        return ImageRef("urls", (text,))
    # `./a.jpg` is `a.jpg`.
    parts = [part for part in text.split("/") if part != "."]
    path = "/".join(parts)
    if not _PATH.fullmatch(path) or _ELSEWHERE.match(path) or not {"", ".."}.isdisjoint(parts):
        raise RecordError(
            "bad_image_ref", "expected an http(s) address, or a plain path below the source"
        )
    return ImageRef("file", (path,))
