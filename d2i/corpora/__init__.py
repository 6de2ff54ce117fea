"""Dialog corpora as a stream of instances: MMDialog, PhotoChat, a team's own JSON lines.

Owns what is read and what is left out, and says so. Fetches no picture. Must not import torch.
"""

import dataclasses
import difflib
import logging
import os
from collections.abc import Callable, Collection, Iterator
from typing import Any, ClassVar, Literal, Protocol, get_args, get_origin, get_type_hints

from d2i import storage
from d2i.corpora.json_stream import read_objects
from d2i.corpora.jsonl import Jsonl
from d2i.corpora.layout import SPLITS
from d2i.corpora.mmdialog import MMDialog
from d2i.corpora.photochat import PhotoChat
from d2i.corpora.records import (
    Dialog,
    Flaw,
    Problem,
    Reason,
    RecordError,
    Report,
    dialog_id_of,
    typed,
)
from d2i.dialog import Direction, Instance, Turn, make_key
from d2i.errors import ConfigError, DataError

__all__ = [
    "CORPORA",
    "SPLITS",
    "Problem",
    "Reason",
    "canonical_split",
    "found_splits",
    "read_instances",
    "splits",
]

_log = logging.getLogger(__name__)


class _Corpus(Protocol):
    """One corpus with its options set."""

    id_field: ClassVar[str]

    @property
    def direction(self) -> Direction: ...

    def files(self, source: str, split: str) -> list[str]: ...

    def parser(self, source: str, split: str) -> Callable[[dict[str, Any], Flaw], Dialog]: ...

    def context(self, turns: tuple[Turn, ...], turn: int) -> tuple[Turn, ...]: ...

    def is_unique(self, split: str) -> bool: ...


CORPORA: dict[str, type[MMDialog] | type[PhotoChat] | type[Jsonl]] = {
    "mmdialog": MMDialog,
    "photochat": PhotoChat,
    "jsonl": Jsonl,
}
"""The corpora by name. The fields of each class are its options."""


def read_instances(
    corpus: str,
    source: str | os.PathLike[str],
    split: str,
    *,
    on_problem: Report | None = None,
    **options: object,
) -> Iterator[Instance]:
    """Read the instances of one split, in the order of its files, as a stream.

    Names, options and the split's presence are checked at once; records are read as the iterator
    is. What is broken never ends it: each such thing is a `Problem`.

    Args:
        corpus: `mmdialog`, `photochat` or `jsonl`.
        source: Path or fsspec URL of the folder the corpus was unpacked to.
        split: `train`, `valid` (also `val`, `dev`, `validation`) or `test`.
        on_problem: Gets every problem; without it they are logged as warnings.
        **options: The fields of the corpus's class in `CORPORA`.

    Raises:
        ConfigError: If the corpus, the split or an option is unknown.
        DataError: If the source holds no such split, or a file of it cannot be opened.
    """
    reader = _build_corpus(corpus, options)
    split = canonical_split(split)
    root = storage.resolve(os.fspath(source))
    files = reader.files(root, split)
    if not files:
        raise DataError(
            f"{corpus} at {os.fspath(source)}: got no {split} split, expected one of "
            f"{', '.join(splits(corpus, source)) or 'none that is there'}; check --source"
        )
    report = _log_problem if on_problem is None else on_problem
    return _read(reader, root, split, files, report)


def splits(corpus: str, source: str | os.PathLike[str]) -> list[str]:
    """List the splits that a source holds, by canonical name: train, valid, test.

    Raises:
        ConfigError: If the corpus is unknown.
    """
    reader = _build_corpus(corpus, {})
    root = storage.resolve(os.fspath(source))
    return [split for split in SPLITS if reader.files(root, split)]


def found_splits(corpus: str, source: str | os.PathLike[str]) -> list[str]:
    """List the splits that a source holds, as `splits` does; there is at least one.

    Raises:
        ConfigError: If the corpus is unknown.
        DataError: If the source holds no split of it.
    """
    found = splits(corpus, source)
    if not found:
        raise DataError(
            f"--source {os.fspath(source)} holds no split of {corpus}; expected the folder that "
            "the corpus was unpacked to; check --corpus and --source"
        )
    return found


def _read(
    corpus: _Corpus, source: str, split: str, files: list[str], report: Report
) -> Iterator[Instance]:
    parse = corpus.parser(source, split)
    seen_dialogs: set[str] = set()
    seen_images: set[tuple[str, ...]] = set()
    is_unique = corpus.is_unique(split)
    for path in files:
        for where, record in _read_file(source, path, report):
            flaw = _flaw_reporter(report, where)
            try:
                dialog_id = _new_dialog_id(record, corpus.id_field, seen_dialogs)
                dialog = parse(typed(record, dict, "record"), flaw)
            except RecordError as error:
                flaw(error.reason, error.detail)
                continue
            seen_dialogs.add(dialog_id)
            for instance in _instances(corpus, split, dialog_id, dialog, flaw):
                if is_unique and instance.image_ref.value in seen_images:
                    continue
                if is_unique:
                    seen_images.add(instance.image_ref.value)
                yield instance


def _read_file(source: str, path: str, report: Report) -> Iterator[tuple[str, Any]]:
    try:
        stream = storage.open_url(storage.join(source, path))
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error}); check the source") from error
    with stream:
        yield from read_objects(stream, path, report)


def _new_dialog_id(record: object, name: str, seen: set[str]) -> str:
    dialog_id = dialog_id_of(record, name)
    if dialog_id in seen:
        raise RecordError("duplicate_dialog_id", f"{name}: seen before, the first dialog is kept")
    return dialog_id


def _instances(
    corpus: _Corpus, split: str, dialog_id: str, dialog: Dialog, flaw: Flaw
) -> Iterator[Instance]:
    for picture in dialog.pictures:
        context = corpus.context(dialog.turns, picture.turn)
        if not any(turn.text.strip() for turn in context):
            flaw("empty_context", f"turn {picture.turn} image {picture.image}: no text with it")
            continue
        yield Instance(
            key=make_key(split, dialog_id, picture.turn, picture.image),
            split=split,
            dialog_id=dialog_id,
            turn=picture.turn,
            image=picture.image,
            context=context,
            image_ref=picture.ref,
            direction=corpus.direction,
            description=dialog.description,
            labels=dialog.labels,
        )


def _flaw_reporter(report: Report, where: str) -> Flaw:
    return lambda reason, detail: report(Problem(reason, where, detail))


def _log_problem(problem: Problem) -> None:
    _log.warning("%s: %s (%s)", problem.where, problem.detail, problem.reason)


def canonical_split(split: str) -> str:
    """Return train, valid or test for a split's name or alias.

    Raises:
        ConfigError: If it is neither.
    """
    for name, aliases in SPLITS.items():
        if split in aliases:
            return name
    raise ConfigError(
        f"split: got {split!r}, expected {', '.join(SPLITS)}{_nearest(split, SPLITS)}"
    )


def _build_corpus(name: str, options: dict[str, object]) -> _Corpus:
    """Build a corpus after checking its options' names and values."""
    if name not in CORPORA:
        raise ConfigError(
            f"corpus: got {name!r}, expected {', '.join(CORPORA)}{_nearest(name, CORPORA)}"
        )
    kind = CORPORA[name]
    hints = get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]
    for option, value in options.items():
        if option not in known:
            raise ConfigError(
                f"{name}: no option {option!r}, expected one of {', '.join(known)}"
                f"{_nearest(option, known)}"
            )
        _check_value(f"{name} {option}", value, hints[option])
    corpus: _Corpus = kind(**options)  # type: ignore[arg-type]
    return corpus


def _check_value(label: str, value: object, hint: Any) -> None:
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if value not in choices:
            raise ConfigError(
                f"{label}: got {value!r}, expected {', '.join(choices)}"
                f"{_nearest(str(value), choices)}"
            )
    elif not isinstance(value, hint):
        raise ConfigError(f"{label}: got {value!r}, expected {hint}; give a text")


def _nearest(name: str, names: Collection[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else "; choose one of these"
