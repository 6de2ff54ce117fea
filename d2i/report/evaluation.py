"""Reading the files of one evaluation: scores, metric card, judge's answers and images."""

from __future__ import annotations

import contextlib
import json
import tarfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike, fspath
from typing import Any

from d2i.errors import DataError
from d2i.io import checksums, markers, parse, storage
from d2i.metric_specs import METRICS
from d2i.report.paper_rows import label_of, proven_label
from d2i.report.table import is_number

_WRITE_AGAIN = "repeat the command that wrote it"
_GENERATE_AGAIN = (
    "delete the tasks/*.npz of its instances and repeat d2i eval to generate them again"
)
MAX_NAMED = 4
"""Largest number of evaluations to name in a sentence or to show as columns."""
_MAX_IMAGE_BYTES = 1 << 26
# Fields that decide a score besides the system itself.
_DECIDING_FIELDS = (
    "manifest_sha256",
    "expected",
    "found",
    "resolution",
    "resize",
    "codec",
    "extractor",
    "sampler",
    "num_steps",
    "guidance_scale",
    "precision",
    "seed",
    "compute_batch_size",
    "device",
    "versions",
)


@dataclass(frozen=True)
class Evaluation:
    """One evaluated system.

    Attributes:
        url: The directory it was read from.
        scores: Score by name, None if a score does not exist for the extractor.
        intervals: 95 % confidence intervals of scores, as [low, high].
        warnings: Warnings about the scores, one line each.
        card: The metric card: everything that decides the scores.
        judged: Attributes read from the images by a rule, if a judge ran; fractions are 0..1.
        image_urls: URL of the tar that holds the generated image, by key of each image kept.
    """

    url: str
    scores: Mapping[str, float | int | None]
    card: Mapping[str, Any]
    judged: Mapping[str, Any] | None
    image_urls: Mapping[str, str]
    intervals: Mapping[str, Sequence[float]] = field(default_factory=dict)
    warnings: Sequence[str] = ()

    @property
    def label(self) -> str:
        """Name of the system, as its card has it."""
        return label_of(self.card) or self.url

    @property
    def proven_label(self) -> str:
        """Name of the system in headings; what its card does not prove is marked as a label."""
        return proven_label(self.card) or self.url

    @cached_property
    def clip_i(self) -> dict[str, float]:
        """CLIP-I of each image by key, from `instances.jsonl`; empty if it does not exist."""
        url = storage.join(self.url, "instances.jsonl")
        lines = storage.read_bytes(url).splitlines() if storage.exists(url) else []
        rows = [parse.parse_json(line, url, next_step=_WRITE_AGAIN) for line in lines]
        return {str(r["key"]): r["clip_i"] for r in rows if is_number(r.get("clip_i"))}

    def read_images(self, keys: Collection[str]) -> dict[str, bytes]:
        """Read the PNG bytes of the named keys, in one pass over each tar that holds any.

        Raises:
            DataError: If a tar is damaged or an image is larger than 64 MiB.
        """
        found: dict[str, bytes] = {}
        for url in sorted({self.image_urls[key] for key in keys}):
            wanted = {f"{key}.png" for key in keys if self.image_urls[key] == url}
            found |= _read_members(url, wanted)
        return found


def read_evaluation(eval_dir: str | PathLike[str]) -> Evaluation:
    """Read `scores.json`, `judged.json` if it exists, and the keys of the images.

    Raises:
        DataError: If `scores.json` is missing, or a file is not what an evaluation writes.
    """
    url = fspath(eval_dir)
    document = read_json(storage.join(url, "scores.json"))
    if document is None:
        raise DataError(
            f"{url}: got no scores.json, expected the output of a finished `d2i eval`; repeat that "
            "command to finish it"
        )
    if not all(isinstance(document.get(part), dict) for part in ("scores", "card")):
        raise DataError(f"{url}/scores.json: expected `scores` and `card`; run `d2i eval` again")
    judged = read_json(storage.join(url, "judged.json"))
    return Evaluation(
        url,
        document["scores"],
        document["card"],
        judged,
        _image_urls(url),
        _possible(document.get("intervals", {})),
        document.get("warnings", ()),
    )


def _possible(intervals: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    """Drop impossible intervals that older evaluations hold: of KID, or beyond a bound."""
    return {
        key: ends
        for key, ends in intervals.items()
        if key in METRICS and METRICS[key].can_be_interval(ends)
    }


def read_json(url: str) -> dict[str, Any] | None:
    """Read a JSON object; return None if the file does not exist.

    Raises:
        DataError: If the file holds something else, or does not match the sha256 beside it.
    """
    try:
        return parse.read_json(url, next_step=_WRITE_AGAIN)
    except (FileNotFoundError, NotADirectoryError):
        return None


def column_names(evaluations: Sequence[Evaluation]) -> list[str]:
    """Return the column headings: Before and After for a fine-tuned pair, else the labels.

    A pair is a run and the weights that it began with, by the sha256 in both metric cards. Labels
    that would be equal get the name of their directory.
    """
    if _is_before_and_after(evaluations):
        return ["Before", "After"]
    return disambiguate([evaluation.proven_label for evaluation in evaluations], evaluations)


def disambiguate(names: Sequence[str], evaluations: Sequence[Evaluation]) -> list[str]:
    """Append the name of each evaluation's directory to names that would be equal."""
    return [
        name
        if names.count(name) == 1
        else f"{name} ({evaluation.url.rstrip('/').rpartition('/')[2]})"
        for name, evaluation in zip(names, evaluations, strict=True)
    ]


def group_comparable(evaluations: Sequence[Evaluation]) -> list[list[int]]:
    """Group the indices of evaluations whose scores are comparable, in order.

    Cards that differ in a field that decides a score, besides the system itself, are separated.
    """
    groups: dict[str, list[int]] = {}
    for number, evaluation in enumerate(evaluations):
        deciding = [_deciding(evaluation, field) for field in _DECIDING_FIELDS]
        groups.setdefault(json.dumps(deciding, sort_keys=True, default=str), []).append(number)
    return list(groups.values())


def differing_fields(evaluations: Sequence[Evaluation]) -> list[str]:
    """Return the fields that decide a score and are not the same for all evaluations."""
    return [
        field
        for field in _DECIDING_FIELDS
        if any(_deciding(e, field) != _deciding(evaluations[0], field) for e in evaluations)
    ]


def lossy_codec(card: Mapping[str, Any]) -> str | None:
    """Return the lossy codecs of a system's generated images, or that there are none.

    None: the card has no codec.
    """
    codec = card.get("codec")
    if codec is None:
        return None
    forms = str(codec).removesuffix(" files").split(", ") if "files" in str(codec) else []
    lossy = [form for form in forms if form != "png"]
    # Retrieved photographs have the same codec as the reference images.
    if not lossy or card.get("kind") == "retrieve":
        return "lossless"
    return f"{', '.join(lossy)} files"


def _deciding(evaluation: Evaluation, field: str) -> Any:
    return lossy_codec(evaluation.card) if field == "codec" else evaluation.card.get(field)


def _is_before_and_after(evaluations: Sequence[Evaluation]) -> bool:
    if len(evaluations) != 2:
        return False
    before, after = evaluations
    is_recorded = all("sha256" in (e.card.get("initial_weights") or {}) for e in evaluations)
    return is_recorded and is_baseline(before, after)


def is_baseline(before: Evaluation, after: Evaluation) -> bool:
    """Return whether `before` is the network that the run of `after` began with, on its text."""
    if before.card.get("run") or not after.card.get("run") or not after.card.get("backbone"):
        return False
    same = ("backbone", "changed_sizes", "text", "context")
    if any(before.card.get(name) != after.card.get(name) for name in same):
        return False
    start, own = (e.card.get("initial_weights") or {} for e in (before, after))
    if own.get("file") == "scratch":
        return False
    # Older cards do not record the hash.
    return "sha256" not in start or "sha256" not in own or start["sha256"] == own["sha256"]


def _image_urls(url: str) -> dict[str, str]:
    paths = [f"images/{n}" for n in storage.list_names(storage.join(url, "images"))]
    tars = [path for path in paths if path.endswith(".tar")]
    sums = markers.read_markers(storage.join(url, "tasks"), next_step=_GENERATE_AGAIN)
    if lost := sorted(p for p in sums.keys() - set(tars) if p.startswith("images/")):
        raise DataError(
            f"{url}/{lost[0]} is missing; expected the images saved by its task; restore it, or "
            "delete its tasks/*.npz and repeat d2i eval"
        )
    found: dict[str, str] = {}
    for path in tars:
        tar, where = storage.join(url, path), f"tasks/{path[7:-4]}.json"
        checksums.check_against(tar, sums.get(path), where=where, next_step=_GENERATE_AGAIN)
        found |= dict.fromkeys(_keys_in(tar), tar)
    return found


def _keys_in(url: str) -> list[str]:
    with _opened(url) as tar:
        names = [member.name for member in tar if member.isfile()]
    return [name.removesuffix(".png") for name in names if name.endswith(".png")]


def _read_members(url: str, names: Collection[str]) -> dict[str, bytes]:
    found = {}
    with _opened(url) as tar:
        for member in tar:
            if member.name not in names:
                continue
            if member.size > _MAX_IMAGE_BYTES:
                raise DataError(
                    f"{url}: {member.name} has {member.size} bytes, expected an image of at most "
                    f"{_MAX_IMAGE_BYTES}"
                )
            file = tar.extractfile(member)
            if file is not None:
                found[member.name.removesuffix(".png")] = file.read()
    return found


@contextlib.contextmanager
def _opened(url: str) -> Iterator[tarfile.TarFile]:
    """Open an uncompressed tar; a damaged one raises DataError."""
    try:
        with storage.open_url(url) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            yield tar
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise DataError(f"{url}: not a complete tar ({error}); run `d2i eval` again") from error
