"""Custom chats: `{train,valid,test}.jsonl` (or `.json`), one conversation per object.

A file is JSON lines, or one array. Every format of `chat_forms` is read; they may be mixed:

    {"id": "7", "turns": [{"speaker": 0, "text": "See?", "images": ["photos/1.jpg"]}, ...]}

`id` is a string or an integer, unique within its file; without one a conversation is named by a
hash of its parsed content, so that equal ones are duplicates. `speaker` (0 to 127, or a name) may
be left out: turns then alternate. Names are numbered in order of appearance in the conversation.
`text` may be left out if there are images. An image is an http or https URL, a path below the
source with `/` between its parts, or a `data:` URL. Other fields are ignored, except that a likely
typo of a missing field is reported.

In the formats with roles, `user` or `human` is speaker 0; `assistant`, `bot`, `model` or `gpt` is
speaker 1, in any case. Messages of `system`, `developer`, `tool`, `function`, `function_call` and
`observation` count as turns but have no speaker: they are not written into the context, and their
images give no instances. The same holds for other roles, and parts of other types are left out;
both are reported as record issues. Must not import torch.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import msgspec

from d2i.corpora.base import Corpus
from d2i.corpora.chat_forms import FORMS, parse_chat
from d2i.corpora.inline import InlineImages, is_data_url
from d2i.corpora.records import Dialog, RecordError, ReportIssue, SharedImage, image_ref_of
from d2i.corpora.split_shares import parse_shares
from d2i.corpora.splits import (
    DIALOG_SUFFIXES,
    SPLIT_ALIASES,
    is_source_file,
    only_one,
    unsplit_file,
)
from d2i.dialog import Turn
from d2i.io import storage

_ID_DIGITS = 20
"""Hexadecimal digits of a hash that serves as an id: 80 bits, enough to avoid collisions in any
corpus."""


@dataclass(frozen=True, kw_only=True)
class Jsonl(Corpus):
    """Options for custom chats: one instance for each image."""

    split_shares: str | None = None
    """Shares of train, valid and test, such as `0.8,0.1,0.1`, that divide one unsplit file by
    dialog; dialogs that show the same image stay together."""
    split_seed: int = 0
    """Seed that decides which dialog goes to which split."""

    title: ClassVar[str] = "jsonl"
    licence: ClassVar[str] = "Your own chats: what you and the people in them agreed on."
    record_type: ClassVar[type[dict[str, Any]]] = dict
    record_fields: ClassVar[frozenset[str]] = frozenset(FORMS)
    max_record_bytes: ClassVar[int] = 64 << 20
    """Room for a conversation with embedded images: two of the largest in base64, and its text."""

    def __post_init__(self) -> None:
        """Raise ConfigError if the shares are invalid."""
        self.split_by()

    def split_by(self) -> tuple[dict[str, float], int] | None:
        """Return the shares and the seed that divide one unsplit file; None for a split corpus."""
        if self.split_shares is None:
            return None
        return parse_shares(self.split_shares), self.split_seed

    def files(self, source: str, split: str) -> list[str]:
        """List the split's file, relative to the source's directory."""
        if (split_by := self.split_by()) is not None:
            return [unsplit_file(source)] if split_by[0][split] > 0 else []
        names = [f"{name}{suffix}" for name in SPLIT_ALIASES[split] for suffix in DIALOG_SUFFIXES]
        if is_source_file(source):
            return [name for name in names if name == unsplit_file(source)]
        present = [name for name in names if storage.exists(storage.join(source, name))]
        return [only_one(present, source)] if present else []

    def parser(
        self, source: str, split: str, inline: InlineImages
    ) -> Callable[[dict[str, Any], ReportIssue], Dialog]:
        """Return the parser of one record; source and split do not matter here."""
        del source, split
        return partial(_parse, inline)


def _parse(inline: InlineImages, fields: dict[str, Any], report_issue: ReportIssue) -> Dialog:
    own_id, read = parse_chat(fields, report_issue)
    turns, shared = [], []
    for index, (turn, images) in enumerate(read):
        turns.append(turn)
        for image, value in enumerate(images):
            try:
                ref = inline.ref_of(value) if is_data_url(value) else image_ref_of(value)
                shared.append(SharedImage(index, image, ref))
            except RecordError as error:
                report_issue(error.reason, f"turn {index} image {image}: {error.detail}")
    number = _hash_of(turns, shared) if own_id is None else own_id
    return Dialog(number, tuple(turns), tuple(shared))


def _hash_of(turns: list[Turn], shared: list[SharedImage]) -> str:
    """Return a hash of the parsed content of a conversation."""
    return hashlib.sha256(msgspec.json.encode([turns, shared])).hexdigest()[:_ID_DIGITS]
