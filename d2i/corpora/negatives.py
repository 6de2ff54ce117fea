"""MMDialog's negative candidates: for each dialog, images that do not answer it.

Only the scores of an evaluation need them. Must not import torch.
"""

import logging
from collections.abc import Iterator

from msgspec import Struct

from d2i.corpora.json_stream import read_objects
from d2i.corpora.mmdialog import MMDialog
from d2i.corpora.records import DialogId, RecordError, RecordIssue
from d2i.errors import DataError
from d2i.io import storage


class _Record(Struct, gc=False):
    """One line of `conversations.json`, with the negative candidates alone."""

    conversation_id: DialogId
    negative_candidate_media_keys: list[str | int]


def read_negatives(source: str, split: str) -> Iterator[tuple[str, list[str]]]:
    """Read the negative candidates of a split: (dialog id, file names of the images).

    Broken records are logged and skipped.

    Args:
        source: Path or fsspec URL of the directory that MMDialog was unpacked to.
        split: `valid` or `test`; the training split lists none.

    Raises:
        DataError: If the source holds no such split, or a file of it cannot be opened.
    """
    root = storage.resolve(source)
    files = MMDialog().files(root, split)
    if not files:
        raise DataError(
            f"{source} holds no {split} split of MMDialog; expected the directory that the corpus "
            "was unpacked to"
        )
    for path in files:
        yield from _read_file(root, path)


def _read_file(root: str, path: str) -> Iterator[tuple[str, list[str]]]:
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
