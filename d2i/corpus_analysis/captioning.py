"""Captioning of the images of a corpus that has no descriptions (`d2i corpus --describe`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import msgspec
from PIL import Image

from d2i.cluster import device_of_worker
from d2i.config import ImageConfig
from d2i.corpora import Corpus, corpus_instances
from d2i.corpora.captions import Description, read_descriptions
from d2i.corpora.splits import source_directory
from d2i.encoders.captioner import Captioner
from d2i.errors import ConfigError
from d2i.images.decode import ImageRejectedError, decode_image
from d2i.images.image_files import check_root, read_image
from d2i.io import storage

BATCH_SIZE = 16
_MAX_IMAGE_BYTES = 20 << 20

_Opened = tuple[str, Image.Image]


@dataclass(frozen=True)
class DescribeSummary:
    """Numbers of images described now and before, and of failures by reason."""

    num_described: int
    num_there: int
    failures: dict[str, int]


def describe(
    corpus: Corpus,
    source: str,
    splits: list[str],
    captioner_name: str,
    out: Path,
    on_batch: Callable[[int], None],
) -> DescribeSummary:
    """Add a line to `out` for each distinct image that has no description yet.

    Lines are flushed to disk batch by batch, so that a repeated command continues where the last
    one stopped. Images given as URLs are not fetched here; they count as `no_file`.

    Args:
        corpus: The corpus, with its options.
        source: The source of the corpus.
        splits: The splits whose images are described.
        captioner_name: A directory or hub repository of a transformers image-to-text model.
        out: The file of descriptions, new or begun by the same captioner.
        on_batch: Called with the number of images described in each batch.

    Raises:
        ConfigError: If another captioner began the file.
        CheckpointError: If the captioner cannot be loaded.
        DataError: If `image_root` is not a valid source of images.
    """
    if corpus.image_root:
        check_root(storage.resolve(corpus.image_root))
    there = _begun(out, captioner_name)
    failures: Counter[str] = Counter()
    missing = _missing(corpus, source, splits, set(there))
    batches = _batches(_opened(corpus, source, missing, failures))
    num_described = 0
    # A captioner is slow to load, and not needed if the file is complete.
    for captioner, batch in _with_captioner(captioner_name, batches):
        texts = captioner.describe([image for _, image in batch])
        names = [image_id for image_id, _ in batch]
        lines = [
            msgspec.json.encode(Description(image_id, text, captioner_name)) + b"\n"
            for image_id, text in zip(names, texts, strict=True)
        ]
        _append(out, lines)
        num_described += len(batch)
        on_batch(len(batch))
    return DescribeSummary(num_described, len(there), dict(sorted(failures.items())))


def _batches(images: Iterator[_Opened]) -> Iterator[list[_Opened]]:
    while batch := list(islice(images, BATCH_SIZE)):
        yield batch


def _with_captioner(
    name: str, batches: Iterator[list[_Opened]]
) -> Iterator[tuple[Captioner, list[_Opened]]]:
    """Yield each batch with the captioner, which is loaded when the first batch arrives."""
    captioner = None
    for batch in batches:
        captioner = captioner or Captioner(name, device_of_worker())
        yield captioner, batch


def _append(out: Path, lines: list[bytes]) -> None:
    storage.append_bytes(str(out), b"".join(lines))
    storage.sync(out)


def _begun(out: Path, captioner_name: str) -> dict[str, Description]:
    """Read the existing descriptions, after dropping a line that a kill cut off."""
    if not out.exists():
        return {}
    data = out.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        storage.write_bytes(str(out), whole)
    there = read_descriptions(str(out))
    others = {found.made_by for found in there.values()} - {captioner_name}
    if others:
        raise ConfigError(
            f"{out} has captions by {', '.join(sorted(others))}, got {captioner_name}; use the "
            "same captioner with --describe, or choose another --descriptions"
        )
    return there


def _missing(
    corpus: Corpus, source: str, splits: list[str], there: set[str]
) -> Iterator[tuple[str, str | None]]:
    """Yield each distinct image without a description, with its path if it is a file."""
    seen = there
    for split in splits:
        for instance in corpus_instances(
            corpus, source, split, on_problem=lambda _: None, max_broken=1.0
        ):
            image_id, ref = corpus.image_id(instance.image_ref), instance.image_ref
            if instance.description is None and image_id not in seen:
                seen.add(image_id)
                yield image_id, ref.value[0] if ref.kind == "file" else None


def _opened(
    corpus: Corpus,
    source: str,
    images: Iterator[tuple[str, str | None]],
    failures: Counter[str],
) -> Iterator[_Opened]:
    root = storage.resolve(corpus.image_root or source_directory(source))
    for image_id, path in images:
        if path is None:
            failures["no_file"] += 1
            continue
        try:
            data = read_image(root, path, _MAX_IMAGE_BYTES)
            decoded = decode_image(data, ImageConfig())
        except ImageRejectedError as err:
            failures[err.reason] += 1
        else:
            yield image_id, decoded.image
