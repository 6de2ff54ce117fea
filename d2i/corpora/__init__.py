"""Dialog corpora as a stream of instances: MMDialog, PhotoChat, custom JSON lines, and your own.

`base` is the interface of a corpus, `registry` has their names, `reader` reads one. Must not import
torch.
"""

from d2i.corpora.base import Corpus
from d2i.corpora.reader import corpus_instances, read_dialogs, read_instances
from d2i.corpora.records import Dialog, Reason, RecordError, RecordIssue, SharedImage
from d2i.corpora.registry import (
    CORPORA,
    RECORD_FIELDS,
    build_corpus,
    canonical_split,
    corpus_title,
    corpus_type,
    found_splits,
    has_captions,
    has_categories,
    parse_record,
    splits,
)

__all__ = [
    "CORPORA",
    "RECORD_FIELDS",
    "Corpus",
    "Dialog",
    "Reason",
    "RecordError",
    "RecordIssue",
    "SharedImage",
    "build_corpus",
    "canonical_split",
    "corpus_instances",
    "corpus_title",
    "corpus_type",
    "found_splits",
    "has_captions",
    "has_categories",
    "parse_record",
    "read_dialogs",
    "read_instances",
    "splits",
]
