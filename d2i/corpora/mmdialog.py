"""MMDialog: `{train,valid,test}/conversations.json` beside flat `{split}/{media_key}.jpg`.

The release names no speakers, so turns are assumed to alternate. Its negative candidates, images
that do not answer a dialog, are read only for the scores of an evaluation. Must not import torch.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from msgspec import UNSET, Struct, UnsetType, field

from d2i.corpora.base import Corpus
from d2i.corpora.inline import InlineImages
from d2i.corpora.json_stream import read_objects
from d2i.corpora.records import (
    Dialog,
    DialogId,
    RecordError,
    RecordIssue,
    ReportIssue,
    SharedImage,
    Text,
    Turns,
)
from d2i.corpora.splits import split_directory
from d2i.dialog import ImageRef, Turn
from d2i.errors import DataError
from d2i.io import storage

_SUFFIXES = (".json", ".jsonl", ".txt")
# A signed number in the release; plain names are accepted too, unless they look like an option.
_MEDIA_KEY = re.compile(r"-?[0-9]{1,20}|[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")


class _Part(Struct, gc=False):
    text: Text | UnsetType = field(name="__TEXT__", default=UNSET)
    media: str | int | UnsetType = field(name="__MEDIA__", default=UNSET)


class _Turn(Struct, gc=False):
    turn: list[_Part]


class MMDialogRecord(Struct, gc=False):
    """One line of `conversations.json`, without the negative candidates."""

    conversation_id: DialogId
    conversation: Turns[_Turn]


@dataclass(frozen=True, kw_only=True)
class MMDialog(Corpus):
    """Options for MMDialog: one instance for each occurrence of an image.

    Its `image_root` may have one directory per split, or all images in one.
    """

    title: ClassVar[str] = "MMDialog"
    licence: ClassVar[str] = (
        "Non-commercial, on request to its authors; not to be shared without their permission."
    )
    record_type: ClassVar[type[Struct]] = MMDialogRecord
    record_fields: ClassVar[frozenset[str]] = frozenset({"conversation"})
    has_negatives: ClassVar[bool] = True
    unique_splits: ClassVar[frozenset[str]] = frozenset({"valid", "test"})

    def files(self, source: str, split: str) -> list[str]:
        """List the split's files, relative to the source: all with `conversations` in the name.

        Names that start with it are tried first, as the directory may hold 1.5 million images too.
        """
        directory = split_directory(source, split)
        if directory is None:
            return []
        url = storage.join(source, directory)
        names = _files_in(storage.list_names(url, "conversations"))
        names = names or _files_in(storage.list_names(url))
        return [f"{directory}/{name}" for name in names]

    def image_id(self, ref: ImageRef) -> str:
        """Return the identity of an image: its media key, as each split has its own directory."""
        return ref.value[0].rpartition("/")[2]

    def parser(
        self, source: str, split: str, inline: InlineImages
    ) -> Callable[[MMDialogRecord, ReportIssue], Dialog]:
        """Return the parser of one record of a split; records embed no images."""
        del inline
        directory = split_directory(self.image_root or source, split)
        image_dir = f"{directory}/" if directory else ""
        return partial(_parse, image_dir)

    def negatives(self, source: str, split: str) -> Iterator[tuple[str, list[str]]]:
        """Read the negative candidates of a split: (dialog id, `image_id` of each).

        Broken records are logged and skipped.

        Args:
            source: Path or fsspec URL of the directory that MMDialog was unpacked to.
            split: `valid` or `test`; the training split lists none.

        Raises:
            DataError: If the source holds no such split, or a file of it cannot be opened.
        """
        root = storage.resolve(source)
        files = self.files(root, split)
        if not files:
            raise DataError(
                f"{source} holds no {split} split of MMDialog; expected the directory that the "
                "corpus was unpacked to"
            )
        for path in files:
            yield from _read_negatives(root, path)


def _files_in(names: list[str]) -> list[str]:
    return [
        name
        for name in names
        if "conversations" in name and name.endswith(_SUFFIXES) and not name.startswith(".")
    ]


def _parse(image_dir: str, record: MMDialogRecord, report_issue: ReportIssue) -> Dialog:
    turns, images = [], []
    for index, turn in enumerate(record.conversation):
        spoken, image = "", 0
        for part in turn.turn:
            if (text := part.text) is not UNSET:
                spoken = f"{spoken} {text}" if spoken else text
            if (media := part.media) is not UNSET:
                key = media if isinstance(media, str) else str(media)
                if _MEDIA_KEY.fullmatch(key):
                    ref = ImageRef("file", (f"{image_dir}{key}.jpg",))
                    images.append(SharedImage(index, image, ref))
                else:
                    report_issue(
                        "bad_image_ref", f"turn {index} image {image}: not a valid media key"
                    )
                image += 1
            elif text is UNSET:
                raise RecordError(
                    "missing_field", f"turn {index}: a part has neither __TEXT__ nor __MEDIA__"
                )
        turns.append(Turn(None, spoken))
    return Dialog(str(record.conversation_id), tuple(turns), tuple(images))


class _Record(Struct, gc=False):
    """One line of `conversations.json`, with the negative candidates alone."""

    conversation_id: DialogId
    negative_candidate_media_keys: list[str | int]


def _read_negatives(root: str, path: str) -> Iterator[tuple[str, list[str]]]:
    try:
        stream = storage.open_url(storage.join(root, path))
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error}); check the source") from error
    with stream:
        for where, record in read_objects(stream, path, _log, _Record):
            if isinstance(record, RecordError):
                _log(RecordIssue(record.reason, where, record.detail))
            else:
                keys = record.negative_candidate_media_keys
                yield str(record.conversation_id), [f"{key}.jpg" for key in keys]


def _log(problem: RecordIssue) -> None:
    message = "%s: %s (%s)"
    logging.getLogger(__name__).warning(message, problem.where, problem.detail, problem.reason)
