"""Registry of the corpora: by name, or by the fields of a record. Must not import torch."""

import dataclasses
import difflib
import importlib
import os
from collections.abc import Collection
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from d2i.corpora.base import Corpus
from d2i.corpora.inline import InlineImages
from d2i.corpora.jsonl import Jsonl
from d2i.corpora.mmdialog import MMDialog
from d2i.corpora.photochat import PhotoChat
from d2i.corpora.records import Dialog, RecordError, ReportIssue
from d2i.corpora.splits import SPLIT_ALIASES
from d2i.dialog import SPLITS
from d2i.errors import ConfigError, DataError
from d2i.io import storage

CORPORA: dict[str, type[Corpus]] = {
    "mmdialog": MMDialog,
    "photochat": PhotoChat,
    "jsonl": Jsonl,
}
"""The corpora by name. The fields of each class are its options."""

RECORD_FIELDS = frozenset[str]().union(*(kind.record_fields for kind in CORPORA.values()))
"""A record has one of these fields, which identifies its corpus."""


def corpus_type(name: str) -> type[Corpus]:
    """Return the class of a corpus by its name, or a user's own as `package.module:Class`.

    Raises:
        ConfigError: If there is none.
    """
    if ":" in name:
        return _load_class(name)
    if name not in CORPORA:
        raise ConfigError(
            f"corpus: got {name!r}, expected {', '.join(CORPORA)} or your own as "
            f"package.module:Class{_nearest(name, CORPORA)}"
        )
    return CORPORA[name]


def corpus_title(name: str) -> str:
    """Return the name of a corpus in tables; other corpora than those of `CORPORA` keep theirs."""
    return CORPORA[name].title if name in CORPORA else name


def has_categories(name: str | None) -> bool:
    """Return whether a corpus is one of `CORPORA` whose labels categories are made of."""
    return name in CORPORA and CORPORA[name].has_categories


def has_captions(name: str | None) -> bool:
    """Return whether a corpus is one of `CORPORA` that describes its images."""
    return name in CORPORA and CORPORA[name].has_captions


def build_corpus(name: str, options: dict[str, object]) -> Corpus:
    """Build a corpus with these options.

    Raises:
        ConfigError: If the corpus is unknown, or an option has an unknown name or a bad value.
    """
    kind = corpus_type(name)
    hints = get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]
    for option, value in options.items():
        if option not in known:
            raise ConfigError(
                f"{name}: no option {option!r}, expected one of {', '.join(known)}"
                f"{_nearest(option, known)}"
            )
        _check_value(f"{name} {option}", value, hints[option])
    return kind(**options)  # type: ignore[arg-type]


def splits(
    corpus: str, source: str | os.PathLike[str], options: dict[str, object] | None = None
) -> list[str]:
    """List the splits that a source holds, by canonical name: train, valid, test.

    Args:
        corpus: As for `read_instances`.
        source: As for `read_instances`.
        options: The fields of the corpus's class that are set.

    Raises:
        ConfigError: If the corpus or an option is unknown.
    """
    reader = build_corpus(corpus, options or {})
    root = storage.resolve(os.fspath(source))
    return [split for split in SPLITS if reader.files(root, split)]


def found_splits(
    corpus: str, source: str | os.PathLike[str], options: dict[str, object] | None = None
) -> list[str]:
    """List the splits that a source holds, as `splits` does; there is at least one.

    Raises:
        ConfigError: If the corpus is unknown.
        DataError: If the source holds no split of it.
    """
    found = splits(corpus, source, options)
    if not found:
        can_divide = hasattr(corpus_type(corpus), "split_shares")
        hint = "; or divide one file with --split 0.8,0.1,0.1" if can_divide else ""
        raise DataError(
            f"--source {os.fspath(source)} holds no split of {corpus}; expected the directory that "
            f"the corpus was unpacked to; check --corpus and --source{hint}"
        )
    return found


def canonical_split(split: str) -> str:
    """Return train, valid or test for a split's name or alias.

    Raises:
        ConfigError: If it is neither.
    """
    for name, aliases in SPLIT_ALIASES.items():
        if split in aliases:
            return name
    raise ConfigError(
        f"split: got {split!r}, expected {', '.join(SPLITS)}{_nearest(split, SPLITS)}"
    )


def parse_record(fields: dict[str, Any], report_issue: ReportIssue) -> Dialog:
    """Parse one record of any corpus, which its fields identify.

    Args:
        fields: The record, which has one of `RECORD_FIELDS`.
        report_issue: Called for each part that is left out.

    Raises:
        RecordError: If it cannot be used.
    """
    kind = next(kind for kind in CORPORA.values() if kind.record_fields & fields.keys())
    try:
        record: Any = msgspec.convert(fields, kind.record_type)
    except msgspec.ValidationError as error:
        raise RecordError.of(error) from error
    return kind().parser(".", "train", InlineImages())(record, report_issue)


def _check_value(label: str, value: object, hint: Any) -> None:
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if value not in choices:
            raise ConfigError(
                f"{label}: got {value!r}, expected {', '.join(choices)}"
                f"{_nearest(str(value), choices)}"
            )
    elif not isinstance(value, hint):
        raise ConfigError(f"{label}: got {value!r}, expected {hint}; give a value of this type")


def _nearest(name: str, names: Collection[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else "; choose one of these"


def _load_class(name: str) -> type[Corpus]:
    module, _, attribute = name.partition(":")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as err:
        raise ConfigError(
            f"corpus {name}: {err}; expected an importable package.module:Class"
        ) from err
    if not (isinstance(kind, type) and issubclass(kind, Corpus)):
        raise ConfigError(f"corpus {name}: got {kind!r}, expected a subclass of d2i.corpora.Corpus")
    return kind
