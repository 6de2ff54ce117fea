"""Captions generated for the images of a corpus that has no descriptions of its own.

A file of JSON lines, `{"image": ..., "description": ..., "made_by": ...}`. `d2i corpus --describe`
writes it; the option `descriptions` of every corpus reads it. `image` is the corpus's `image_id`.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from d2i.corpora.json_stream import read_objects
from d2i.corpora.records import RecordError, RecordIssue
from d2i.dialog import Instance
from d2i.errors import ConfigError
from d2i.io import storage


class Description(msgspec.Struct, frozen=True, gc=False):
    """The caption of one image, and the name of the model that generated it."""

    image: str
    description: str
    made_by: str


def read_descriptions(url: str) -> dict[str, Description]:
    """Read all captions of a file, by image id; the last one of an image wins.

    Raises:
        ConfigError: If the file does not exist, or a line is not a caption.
    """

    def refuse(problem: RecordIssue) -> None:
        raise ConfigError(
            f"descriptions {problem.where}: {problem.detail} ({problem.reason}); repeat "
            "'d2i corpus --describe' to finish the file, or fix that line"
        )

    found: dict[str, Description] = {}
    try:
        stream = storage.open_url(url)
    except FileNotFoundError:
        raise ConfigError(
            f"descriptions {url}: no such file; make it with 'd2i corpus --describe'"
        ) from None
    with stream:
        for where, value in read_objects(stream, url, refuse, Description):
            if isinstance(value, RecordError):
                refuse(RecordIssue(value.reason, where, value.detail))
            found[value.image] = value
    return found


def with_descriptions(
    instances: Iterator[tuple[str, Instance]], described: dict[str, Description]
) -> Iterator[Instance]:
    """Fill in missing descriptions of (image id, instance) pairs, with the model that made them."""
    for image, instance in instances:
        found = described.get(image)
        if found is None or instance.description is not None:
            yield instance
        else:
            yield msgspec.structs.replace(
                instance, description=found.description, description_by=found.made_by
            )
