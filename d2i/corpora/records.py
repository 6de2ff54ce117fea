"""Records of a corpus: the dialog that each is parsed to, or the record issue that it has.

Owns `RecordIssue` and its counter, the types that the records of all corpora are declared with, and
`Dialog`. Must not import torch.
"""

from __future__ import annotations

import re
from collections import Counter
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
"""A dialog with more turns is skipped, because every image repeats the turns before it."""

_T = TypeVar("_T")
Turns = Annotated[list[_T], Meta(max_length=MAX_TURNS)]
Text = Annotated[str, Meta(max_length=1 << 16)]
"""Text of a turn. Longer texts are no conversation, and combining marks take quadratic time."""
Name = Annotated[str, Meta(max_length=1024)]
DialogId = int | Name
Speaker = Annotated[int, Meta(ge=0, le=127)]

_WEB_URL = re.compile(r"https?://[^\s\x00-\x1f]+", re.IGNORECASE)
# No home directory, backslash, wildcard or control character, and no leading '-', which a command
# would take for an option. Brackets and colons occur in file names of cameras and screenshots.
_PATH = re.compile(r"[^-~\\*?\x00-\x1f\x7f][^\\*?\x00-\x1f\x7f]{0,1023}")
# A scheme, a drive, or a chain of file systems.
_ELSEWHERE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:|.*::", re.DOTALL)
ReportIssue = Callable[[Reason, str], None]
"""Callback that reports a part of a record that is left out while the rest is used."""
_NUM_DESCRIBED = 3


class RecordIssue(Struct, frozen=True, gc=False, omit_defaults=True):
    """An issue with a record or a file of a corpus.

    `where` is the file, relative to the source, with line or byte offset; `detail` tells what was
    found and expected, and quotes no message of the dialog. `num_records` is how many records may
    be lost, if a part of a file had to be skipped.
    """

    reason: Reason
    where: str
    detail: str
    num_records: int = 1


Report = Callable[[RecordIssue], None]


class RecordError(Exception):
    """A record that cannot be used at all; it becomes a `RecordIssue` within this package."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason: Reason = reason
        self.detail = detail

    @classmethod
    def of(cls, error: msgspec.ValidationError) -> Self:
        """Convert a type error of a record; the detail names the field, never its value."""
        detail = str(error)
        if "missing required field" in detail:
            return cls("missing_field", detail)
        return cls("too_large" if "of length" in detail else "wrong_type", detail)


class SharedImage(Struct, frozen=True, gc=False):
    """One occurrence of an image: its turn, its index among that turn's images, its reference."""

    turn: int
    image: int
    ref: ImageRef


class Dialog(Struct, frozen=True, gc=False):
    """A parsed record: all turns, including silent ones, and the images with a valid reference."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[SharedImage, ...]
    description: str | None = None
    labels: tuple[str, ...] = ()


def is_web_url(text: str) -> bool:
    """Return whether a text is an http or https URL; any destination is accepted."""
    if _WEB_URL.fullmatch(text) is None:
        return False
    try:
        return bool(urlsplit(text).hostname)
    except ValueError:
        return False


def image_ref_of(text: str) -> ImageRef:
    """Return the reference to an image that a corpus gives as a URL or a path below the source.

    Raises:
        RecordError: If it is neither: another scheme, an absolute path, or a path with `..`.
    """
    if is_web_url(text):
        return ImageRef("urls", (text,))
    # `./a.jpg` is `a.jpg`.
    parts = [part for part in text.split("/") if part != "."]
    path = "/".join(parts)
    if not _PATH.fullmatch(path) or _ELSEWHERE.match(path) or not {"", ".."}.isdisjoint(parts):
        raise RecordError(
            "bad_image_ref", "expected an http(s) URL, or a plain path below the source"
        )
    return ImageRef("file", (path,))


class IssueCounter:
    """Counts record issues, and keeps the first one of each reason."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, RecordIssue] = {}

    def add(self, problem: RecordIssue) -> None:
        """Count one issue."""
        self._counts[problem.reason] += 1
        self._first.setdefault(problem.reason, problem)

    @property
    def counts(self) -> dict[str, int]:
        """Number of issues by reason, sorted by reason."""
        return dict(sorted(self._counts.items()))

    @property
    def first(self) -> dict[str, dict[str, str]]:
        """First issue of each reason, sorted: `where` (file and line or byte) and `detail`."""
        return {
            reason: {"where": problem.where, "detail": problem.detail}
            for reason, problem in sorted(self._first.items())
        }

    def describe(self) -> str:
        """Describe the most common reasons, each with its first case; empty if there is none."""
        named = [
            f"{count} {reason} (first: {self._first[reason].where}: {self._first[reason].detail})"
            for reason, count in self._counts.most_common(_NUM_DESCRIBED)
        ]
        num_others = len(self._counts) - len(named)
        return ", ".join([*named, *([f"{num_others} other reasons"] if num_others else [])])
