"""Reading of a corpus as a stream: dialogs, and the instances that are made of them.

Decides which records are used and reports the others as record issues. Fetches no image. Must not
import torch.
"""

import dataclasses
import itertools
import logging
import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

from d2i.corpora.base import Corpus
from d2i.corpora.captions import read_descriptions, with_descriptions
from d2i.corpora.compact_set import CompactHashSet
from d2i.corpora.foreign import unsupported_format
from d2i.corpora.inline import InlineImages
from d2i.corpora.json_stream import read_objects
from d2i.corpora.records import (
    MAX_TURNS,
    Dialog,
    IssueCounter,
    Reason,
    RecordError,
    RecordIssue,
    Report,
    ReportIssue,
)
from d2i.corpora.registry import build_corpus, canonical_split
from d2i.corpora.split_shares import DialogSplits
from d2i.corpora.splits import source_directory
from d2i.dialog import SPLITS, Instance
from d2i.errors import DataError
from d2i.images.file_kind import HEAD_BYTES
from d2i.io import storage

MAX_BROKEN, FEW_BROKEN = 0.1, 100
"""Share of a split's records that may be broken, and a number that may be broken anyway if no file
has more broken records than sound ones. Beyond that, the files are probably in another format."""

MAX_CONTEXT_CHARS = 64 << 20
"""A dialog is skipped if the contexts of its images could add up to more characters."""

MAX_IMAGES = 1024
"""A dialog with more images is skipped."""

_TURN_CHARS = 16
"""Overhead of a turn beside its text, in characters."""
_NAMES_ONLY = InlineImages()
_log = logging.getLogger(__name__)
# Issues that do not make a record count as broken.
_SOUND: frozenset[Reason] = frozenset(
    {"bad_image_ref", "empty_context", "empty_file", "no_image", "repaired", "unknown_field"}
)


def read_instances(
    corpus: str,
    source: str | os.PathLike[str],
    split: str,
    *,
    on_problem: Report | None = None,
    max_broken: float | None = None,
    inline: InlineImages = _NAMES_ONLY,
    **options: object,
) -> Iterator[Instance]:
    """Read the instances of one split, in the order of its files, as a stream.

    Names, options and the split's presence are checked at once; records are read lazily. Broken
    data becomes a `RecordIssue` and stops nothing before the last record has been read.

    Args:
        corpus: `mmdialog`, `photochat` or `jsonl`.
        source: Path or fsspec URL of the directory the corpus was unpacked to.
        split: `train`, `valid` (also `val`, `dev`, `validation`) or `test`.
        on_problem: Called with every record issue; without it they are logged as warnings.
        max_broken: Share of the records, 0 to 1, that may be broken; by default `MAX_BROKEN`,
            or `FEW_BROKEN` records, and at most half of the records of any file.
        inline: Handling of images embedded in the records; by default they are only named.
        **options: The fields of the corpus's class in `CORPORA`.

    Raises:
        ConfigError: If the corpus, the split or an option is unknown.
        DataError: If the source holds no such split, or a file of it cannot be opened; after the
            last record, if more than `max_broken` of the records were broken.
    """
    return corpus_instances(
        build_corpus(corpus, options),
        source,
        canonical_split(split),
        on_problem=on_problem,
        max_broken=max_broken,
        inline=inline,
    )


def corpus_instances(
    corpus: Corpus,
    source: str | os.PathLike[str],
    split: str,
    *,
    on_problem: Report | None = None,
    max_broken: float | None = None,
    inline: InlineImages = _NAMES_ONLY,
) -> Iterator[Instance]:
    """Read instances as `read_instances` does, of a corpus from `build_corpus`."""
    dialogs, report_issue = read_dialogs(
        corpus, source, split, on_problem=on_problem, max_broken=max_broken, inline=inline
    )
    instances = _instances(corpus, split, dialogs, report_issue)
    if corpus.descriptions is None:
        return instances
    described = read_descriptions(corpus.descriptions)
    return with_descriptions(((corpus.image_id(i.image_ref), i) for i in instances), described)


def read_dialogs(
    corpus: Corpus,
    source: str | os.PathLike[str],
    split: str,
    *,
    on_problem: Report | None = None,
    max_broken: float | None = None,
    inline: InlineImages = _NAMES_ONLY,
) -> tuple[Iterator[Dialog], ReportIssue]:
    """Read the dialogs of one split as a stream.

    Args:
        corpus: A corpus with its options set, from `build_corpus`.
        source: Path or fsspec URL of the directory the corpus was unpacked to.
        split: `train`, `valid` or `test`.
        on_problem: Called with every record issue; without it they are logged as warnings.
        max_broken: As for `read_instances`.
        inline: As for `read_instances`.

    Returns:
        The dialogs, and a callback that reports an issue in the dialog yielded last.

    Raises:
        DataError: As `read_instances` does.
    """
    root = storage.resolve(os.fspath(source))
    files = corpus.files(root, split)
    if not files:
        found = ", ".join(name for name in SPLITS if corpus.files(root, name))
        raise DataError(
            f"{os.fspath(source)}: got no {split} split, found {found or 'no split'}; check "
            "--corpus and --source"
        )
    splits = (
        None if corpus.split_by() is None else _dialog_splits(corpus, root, _version(root, files))
    )
    reading = _Reading(on_problem or _log_problem, split, splits)
    parse = corpus.parser(root, split, inline)
    return _dialogs(corpus, parse, root, files, reading, max_broken), reading.report_issue


def _version(root: str, files: list[str]) -> str:
    """Return a string that changes when the files do."""
    urls = [storage.join(source_directory(root), path) for path in files]
    return " ".join(storage.version(url) for url in urls)


@lru_cache(maxsize=1)
def _dialog_splits(corpus: Corpus, root: str, version: str) -> DialogSplits:
    """Read an unsplit file once to divide its dialogs; issues are reported when a split is read."""
    del version
    split_by = corpus.split_by()
    assert split_by is not None
    shares, seed = split_by
    split = next(name for name in SPLITS if shares[name] > 0)
    files = corpus.files(root, split)
    reading = _Reading(lambda _: None, split, None)
    parse = corpus.parser(root, split, _NAMES_ONLY)
    dialogs = _dialogs(corpus, parse, root, files, reading, max_broken=1.0)
    return DialogSplits(dialogs, corpus.image_id, shares, seed)


def _instances(
    corpus: Corpus, split: str, dialogs: Iterator[Dialog], report_issue: ReportIssue
) -> Iterator[Instance]:
    instances = itertools.chain.from_iterable(
        corpus.instances(dialog, split, report_issue) for dialog in dialogs
    )
    return _first_occurrences(corpus, instances) if corpus.is_unique(split) else instances


def _first_occurrences(corpus: Corpus, instances: Iterator[Instance]) -> Iterator[Instance]:
    seen = CompactHashSet()  # Names may be long.
    for instance in instances:
        image = hash(corpus.image_id(instance.image_ref))
        if image not in seen:
            seen.add(image)
            yield instance


@dataclasses.dataclass
class _Count:
    """Number of sound and of broken records in a file or a split."""

    sound: int = 0
    broken: int = 0

    @property
    def records(self) -> int:
        """Number of all records."""
        return self.sound + self.broken


class _Reading:
    """State of reading one split: the position, the broken records, and where to report issues.

    In a file divided by shares, issues of a dialog are reported only in its own split, and those
    of records without a dialog only in the first split. All are counted in every split.
    """

    def __init__(self, report: Report, split: str, splits: DialogSplits | None) -> None:
        self.report = report
        self.split = split
        self.splits = splits
        self.where = ""
        self.held: list[RecordIssue] | None = None
        self.in_split = _Count()
        self.in_file = _Count()
        self.broken_where = ""
        self.broken_file = ""
        self.gave_up = False
        self.broken = IssueCounter()

    def begin(self, where: str) -> None:
        """Begin a record."""
        self.where = where
        self.held = []

    def is_own(self, dialog: Dialog | None) -> bool:
        """Return whether a record is of this split; `dialog` is None if it has none."""
        if self.splits is None:
            return True
        return self.split == (
            next(iter(SPLITS)) if dialog is None else self.splits.split_of(dialog)
        )

    def end(self, *, is_own: bool) -> None:
        """Report the issues held back for a record if it is of this split, else drop them."""
        held, self.held = self.held or [], None
        for problem in held if is_own else ():
            self.report(problem)

    def problem(self, problem: RecordIssue) -> None:
        """Count an issue of the file or of the record being read, and pass it on."""
        self._count_broken(problem)
        if self.held is not None:
            self.held.append(problem)
        elif self.is_own(None):
            self.report(problem)

    def report_issue(self, reason: Reason, detail: str) -> None:
        """Report an issue in the record being read, or read last."""
        problem = RecordIssue(reason, self.where, detail)
        if self.held is None:
            # An issue of an instance: only records of this split have instances.
            self._count_broken(problem)
            self.report(problem)
        else:
            self.problem(problem)

    def _count_broken(self, problem: RecordIssue) -> None:
        """Count a record as broken at its first issue that makes it so."""
        self.gave_up |= problem.reason == "too_many_broken"
        if problem.reason in _SOUND:
            return
        self.broken.add(problem)
        if problem.where != self.broken_where:
            self.broken_where = problem.where
            self.in_file.broken += problem.num_records

    def count_read(self) -> None:
        """Count the record being read as sound, unless an issue made it broken."""
        self.in_file.sound += self.where != self.broken_where

    def end_file(self, path: str) -> None:
        """Add a file's counts to those of the split."""
        count = self.in_file
        if count.broken > count.sound and not self.broken_file:
            self.broken_file = f"{count.broken} broken of {count.records} records of {path}"
        self.in_split.sound += count.sound
        self.in_split.broken += count.broken
        self.in_file = _Count()

    def refuse_if_broken(self, max_broken: float | None) -> None:
        """Raise DataError if more records were broken than allowed."""
        split, count, why = self.split, self.in_split, self.broken.describe()
        if why and not count.sound and max_broken != 1:
            # Allowing more broken records would not help.
            raise DataError(
                f"{split}: no record could be read: {why}; expected the records of a "
                "corpus; check --corpus and --source"
            )
        if self.gave_up and max_broken != 1:
            raise DataError(
                f"{split}: read {count.sound} records, then the rest of a file could not be read: "
                f"{why}; fix the file, or skip the rest with --set corpus.max_broken=1"
            )
        share = MAX_BROKEN if max_broken is None else max_broken
        few = FEW_BROKEN if max_broken is None else 0
        found, allowed = "", f"a share of at most {share:g}"
        if count.broken > max(share * count.records, few):
            found = f"{count.broken} broken of {count.records} records"
        elif self.broken_file and max_broken is None:
            found, allowed = self.broken_file, "at most half of a file's records"
        if found:
            raise DataError(
                f"{split}: got {found}: {why}; expected {allowed}; "
                "check --corpus and --source, or allow more with --set corpus.max_broken=1"
            )


def _dialogs(
    corpus: Corpus,
    parse: Callable[[Any, ReportIssue], Dialog],
    source: str,
    files: list[str],
    reading: _Reading,
    max_broken: float | None,
) -> Iterator[Dialog]:
    # No record can have contexts that are too long with at most this many images.
    few_images = MAX_CONTEXT_CHARS // (corpus.max_record_bytes + MAX_TURNS * _TURN_CHARS)
    seen = CompactHashSet()  # Ids may be long.
    is_empty = True
    for path in files:
        for where, record in _read_file(source, path, reading.problem, corpus):
            reading.begin(where)
            dialog = _parsed(record, parse, reading.report_issue)
            is_own = reading.is_own(dialog)
            is_kept = dialog is not None and _is_kept(
                dialog, seen, few_images, reading.report_issue
            )
            reading.end(is_own=is_own)
            if dialog is not None and is_kept:
                reading.count_read()
                if is_own:
                    is_empty = False
                    yield dialog
        reading.end_file(path)
    reading.refuse_if_broken(max_broken)
    if is_empty and reading.splits is not None:
        raise DataError(
            f"{reading.split}: 0 of {reading.in_split.sound} dialogs fall into this split; "
            "expected at least one; give it a larger share, or 0"
        )


def _parsed(
    record: Any, parse: Callable[[Any, ReportIssue], Dialog], report_issue: ReportIssue
) -> Dialog | None:
    """Return the dialog of a record, or None after reporting why it has none."""
    if isinstance(record, RecordError):
        report_issue(record.reason, record.detail)
        return None
    try:
        return parse(record, report_issue)
    except RecordError as error:
        report_issue(error.reason, error.detail)
        return None


def _is_kept(
    dialog: Dialog, seen: CompactHashSet, few_images: int, report_issue: ReportIssue
) -> bool:
    """Return whether a dialog is used: it is the first with its id, and not too large."""
    number = hash(dialog.id)
    if number in seen:
        report_issue("duplicate_dialog_id", "its id occurred before; the first dialog is kept")
        return False
    if len(dialog.images) > few_images and _is_too_large(dialog):
        report_issue(
            "too_large", f"{len(dialog.images)} images: too many, or their contexts are too long"
        )
        return False
    seen.add(number)
    return True


def _is_too_large(dialog: Dialog) -> bool:
    """Return whether the contexts of a dialog would take far more memory than the dialog."""
    num_images = len(dialog.images)
    num_chars = sum(len(turn.text) + _TURN_CHARS for turn in dialog.turns)
    return num_images > MAX_IMAGES or num_chars * num_images > MAX_CONTEXT_CHARS


def _read_file(source: str, path: str, report: Report, corpus: Corpus) -> Iterator[tuple[str, Any]]:
    url = storage.join(source_directory(source), path)
    try:
        if kind := unsupported_format(storage.read_head(url, HEAD_BYTES)):
            raise DataError(f"{url} is {kind}")
        stream = storage.open_url(url)
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error}); check the source") from error
    with stream:
        yield from read_objects(
            stream, path, report, corpus.record_type, max_record_bytes=corpus.max_record_bytes
        )


def _log_problem(problem: RecordIssue) -> None:
    _log.warning("%s: %s (%s)", problem.where, problem.detail, problem.reason)
