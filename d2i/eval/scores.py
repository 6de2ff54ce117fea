"""All scores of an evaluation, their intervals, what to beware of, and a row for each instance."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from d2i.errors import DataError
from d2i.eval.bootstrap import (
    Resamples,
    deviation,
    draw_resamples,
    fid_deviation,
    inception_deviation,
    intervals,
    mean_deviation,
)
from d2i.eval.kid import unbiased_mmd
from d2i.eval.metrics import Draws, compute_fid, score_features
from d2i.eval.negatives import Listed
from d2i.eval.recall import NUM_NEGATIVES, true_ranks
from d2i.metric_specs import RECALLS

Arrays = dict[str, NDArray[Any]]

# Inception's features have 2048 dimensions: of fewer pictures, the covariance is not of full rank.
_FEW_PICTURES = 2048
_MIN_PICTURES = 2
_SEED = 2020
_MAX_RESAMPLED = 32_768
"""Instances that intervals come from at most (ours): KID's takes time by the square of it."""
_OF_DRAWN = frozenset({"features", "embeddings", "logits"})
"""What has a row a drawn picture; all else has a row an instance."""


@dataclass(frozen=True)
class Measured:
    """What the tasks of an evaluation left, all together, in the order of the data set.

    `keys`, `reasons`, `sources`, `is_flat`, `real_features`, `real_embeddings` and, with a text
    tower, `text_embeddings` have a row an instance; `features`, `embeddings` and, where the
    extractor has classes, `logits` a row a drawn picture. `listed` are the negatives that a corpus
    lists, where they were asked for.
    """

    arrays: Arrays
    listed: Listed | None = None

    @cached_property
    def drawn(self) -> NDArray[np.int64]:
        """The indices of the instances that have a picture."""
        return np.flatnonzero(self.arrays["reasons"] == "")

    @property
    def failures(self) -> dict[str, int]:
        """Instances without a picture, by reason."""
        reasons = self.arrays["reasons"]
        return dict(sorted(Counter(reasons[reasons != ""].tolist()).items()))

    @property
    def sources(self) -> list[str]:
        """The distinct sources of the pictures: memory, or form and size of their files."""
        return sorted(set(self.arrays["sources"][self.drawn].tolist()))

    @cached_property
    def clip_i(self) -> NDArray[np.float64]:
        """100 times the cosine of each drawn picture to the true one."""
        return _cosines(self.arrays["embeddings"], self.arrays["real_embeddings"][self.drawn])

    @cached_property
    def clip_t(self) -> NDArray[np.float64] | None:
        """100 times the cosine of each drawn picture to its whole dialog."""
        text = self.arrays.get("text_embeddings")
        return None if text is None else _cosines(self.arrays["embeddings"], text[self.drawn])

    @cached_property
    def ranks(self) -> NDArray[np.int64]:
        """The rank of each drawn picture's true one among negatives."""
        return true_ranks(
            self.arrays["keys"].tolist(),
            self.drawn,
            self.arrays["embeddings"],
            self.arrays["real_embeddings"],
            self.listed.of_instances if self.listed else None,
        )


def score(measured: Measured, resolution: int) -> dict[str, Any]:
    """Compute every score.

    Args:
        measured: All of an evaluation.
        resolution: The side at which the pictures were measured.

    Returns:
        `scores` by name; `intervals`, 95 % confidence as [low, high]; `warnings`, one line each.

    Raises:
        DataError: If fewer than two pictures were drawn, or a value is not finite.
    """
    if len(measured.drawn) < _MIN_PICTURES:
        raise DataError(
            f"got {len(measured.drawn)} pictures for {len(measured.arrays['keys'])} instances "
            f"({_counted(measured.failures)}); expected at least {_MIN_PICTURES}; see "
            "instances.jsonl"
        )
    with _one_thread():
        return _scored(measured) | {"warnings": list(_warnings(measured, resolution))}


def instance_rows(measured: Measured) -> Iterator[dict[str, Any]]:
    """Give a row for each instance: its key, why it has no picture, or what its picture scores."""
    places = {index: place for place, index in enumerate(measured.drawn.tolist())}
    for index, (key, reason) in enumerate(
        zip(measured.arrays["keys"].tolist(), measured.arrays["reasons"].tolist(), strict=True)
    ):
        place = places.get(index)
        if place is None:
            yield {"key": key, "status": reason}
            continue
        row = {"clip_i": float(measured.clip_i[place]), "rank": int(measured.ranks[place])}
        if measured.clip_t is not None:
            row["clip_t"] = float(measured.clip_t[place])
        yield {"key": key, "status": "ok"} | row


def _scored(measured: Measured) -> dict[str, Any]:
    """Compute scores, and their intervals from what the scores were computed on."""
    arrays = {name: _wide(array) for name, array in measured.arrays.items()}
    part = _choose_part(measured)
    resamples = draw_resamples(len(part.instances), part.drawn)
    found = score_features(
        arrays["real_features"],
        arrays["features"],
        arrays.get("logits"),
        arrays["real_embeddings"][measured.drawn],
        arrays["embeddings"],
        Draws(),
        resamples if part.is_whole else None,
    )
    fid_clip = compute_fid(arrays["real_embeddings"], arrays["embeddings"])
    scores = found.scores | {"fid_clip": fid_clip} | _scores_of_pictures(measured)
    deviations = _deviations_of_sets(
        part.of(arrays), found.resampled_kid, resamples, int(scores["is_splits"] or 1)
    ) | _deviations_of_pictures(measured, part.places, resamples)
    # A deviation falls with the root of the number of instances.
    scale = float(np.sqrt(len(part.instances) / len(arrays["keys"])))
    scaled = {name: scale * value for name, value in deviations.items()}
    return {"scores": scores, "intervals": intervals(scores, scaled)}


@dataclass(frozen=True)
class _Part:
    """The instances that intervals come from.

    Args:
        instances: Their indices, in order.
        places: Where those that have a drawn picture are among all that have one.
        drawn: The same ones among `instances`.
        is_whole: Whether it is all instances.
    """

    instances: NDArray[np.int64]
    places: NDArray[np.int64]
    drawn: NDArray[np.int64]
    is_whole: bool

    def of(self, arrays: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        """Return its rows of all arrays."""
        if self.is_whole:
            return arrays
        return {
            name: array[self.places if name in _OF_DRAWN else self.instances]
            for name, array in arrays.items()
        }


def _choose_part(measured: Measured) -> _Part:
    """Choose all instances, or of very many so many of them at random."""
    num = len(measured.arrays["keys"])
    instances = np.arange(num)
    if num > _MAX_RESAMPLED:
        generator = np.random.default_rng([_SEED, num])
        instances = np.sort(generator.choice(num, _MAX_RESAMPLED, replace=False))
    places = np.flatnonzero(np.isin(measured.drawn, instances))
    drawn = np.searchsorted(instances, measured.drawn[places])
    return _Part(instances, places, drawn, is_whole=len(instances) == num)


def _scores_of_pictures(measured: Measured) -> dict[str, float | int | None]:
    """Give the scores that are means over pictures, CLIP-I aside."""
    recalls = {f"recall_{k}": 100 * float((measured.ranks <= k).mean()) for k in RECALLS}
    return {
        "clip_t": None if measured.clip_t is None else float(measured.clip_t.mean()),
        **recalls,
        "num_negatives": min(NUM_NEGATIVES, len(measured.arrays["keys"]) - 1),
    }


def _deviations_of_sets(
    arrays: Mapping[str, NDArray[Any]],
    resampled_kid: NDArray[np.float64] | None,
    resamples: Resamples,
    num_splits: int,
) -> dict[str, float]:
    features = arrays["real_features"], arrays["features"]
    if resampled_kid is None:
        resampled_kid = unbiased_mmd(*features, resamples.real, resamples.fake)
    found = {
        "fid": fid_deviation(*features, resamples),
        "kid": deviation(resampled_kid),
        "fid_clip": fid_deviation(arrays["real_embeddings"], arrays["embeddings"], resamples),
    }
    if "logits" in arrays:
        found["is"] = inception_deviation(arrays["logits"], resamples, num_splits)
    return found


def _deviations_of_pictures(
    measured: Measured, places: NDArray[np.int64], resamples: Resamples
) -> dict[str, float]:
    found = {"clip_i": mean_deviation(measured.clip_i[places], resamples)}
    ranks = measured.ranks[places]
    for k in RECALLS:
        found[f"recall_{k}"] = mean_deviation(np.where(ranks <= k, 100.0, 0.0), resamples)
    if measured.clip_t is not None:
        found["clip_t"] = mean_deviation(measured.clip_t[places], resamples)
    return found


def _warnings(measured: Measured, resolution: int) -> Iterator[str]:
    num_drawn, keys = len(measured.drawn), measured.arrays["keys"]
    if num_drawn < _FEW_PICTURES:
        yield (
            f"{num_drawn} pictures: FID is unsteady and biased under {_FEW_PICTURES}; compare it "
            "with none of another number of pictures"
        )
    if measured.failures:
        yield (
            f"{num_drawn} of {len(keys)} instances have a picture ({_counted(measured.failures)}); "
            "the others are left out, not replaced"
        )
    if len(keys) > _MAX_RESAMPLED:
        yield f"intervals come from {_MAX_RESAMPLED} of {len(keys)} instances, scaled to all"
    if measured.listed and (number := measured.listed.mean_number) < NUM_NEGATIVES:
        yield (
            f"of the {NUM_NEGATIVES} negatives that {measured.listed.source} lists for a dialog, "
            f"{number:.1f} are pictures of the data set; the rest were drawn by key hash"
        )
    flat = np.flatnonzero(measured.arrays["is_flat"])
    if len(flat):
        yield f"{len(flat)} pictures are of one colour, the first is that of {keys[flat[0]]}"
    if num_drawn > 1 and (measured.arrays["embeddings"] == measured.arrays["embeddings"][0]).all():
        yield "all pictures are alike to CLIP: the system draws one picture for every dialog"
    yield from _source_warnings(measured.sources, resolution)


def _source_warnings(sources: list[str], resolution: int) -> Iterator[str]:
    files = [source.split() for source in sources if " " in source]
    codecs, sizes = {form for form, _ in files}, {size for _, size in files}
    if "jpg" in codecs:
        yield "some pictures were read from JPEG: its artefacts are scored too; prefer PNG"
    if len(codecs) > 1:
        yield f"the pictures are of different codecs ({', '.join(sorted(codecs))}); expected one"
    if len(sizes) > 1:
        shown = ", ".join(sorted(sizes)[:3])
        yield f"the pictures have {len(sizes)} sizes ({shown}), each resized by itself"
    if small := sorted(size for size in sizes if min(map(int, size.split("x"))) < resolution):
        yield (
            f"pictures of {small[0]} were enlarged to {resolution}x{resolution}: what they lack in "
            "detail is scored too"
        )


def _cosines(rows: NDArray[Any], others: NDArray[Any]) -> NDArray[np.float64]:
    a, b = _wide(rows), _wide(others)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    found: NDArray[np.float64] = 100 * (a * b).sum(axis=1) / np.where(norms == 0, 1, norms)
    return found


def _wide(array: NDArray[Any]) -> NDArray[Any]:
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def _counted(failures: dict[str, int]) -> str:
    return ", ".join(f"{number} {reason}" for reason, number in failures.items()) or "no failure"


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Sum in one order, whatever the driver was doing before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
