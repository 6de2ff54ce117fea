"""All scores of an evaluation, their intervals and warnings, and a row for each instance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2i.errors import DataError
from d2i.eval.metrics.compute import compute_fid, compute_scores
from d2i.eval.metrics.influences import fid_influences, inception_influences
from d2i.eval.metrics.intervals import Ends, bca, normal, total_deviation, wilson
from d2i.eval.metrics.kid import PairedMmd, paired_mmd
from d2i.eval.metrics.measured import Arrays, Measured, to_float64
from d2i.eval.metrics.retrieval_recall import NUM_NEGATIVES
from d2i.eval.metrics.score_warnings import counted, score_warnings
from d2i.eval.one_thread import one_thread
from d2i.metric_specs import METRICS, RECALLS, MetricSpec

Scores = dict[str, float | int | None]

_MIN_IMAGES = 2
_SEED = 2020
_MAX_RESAMPLED = 32_768
"""Most instances that intervals are computed from (our limit): KID's take quadratic time."""


def score(measured: Measured, resolution: int) -> dict[str, Any]:
    """Compute all scores of an evaluation.

    Args:
        measured: All measurements of the evaluation.
        resolution: The side in pixels at which the images were measured.

    Returns:
        `scores` by name, None where there is none or it would be the same for any images;
        `intervals`, 95 % confidence as [low, high]; `warnings`, one line each.

    Raises:
        DataError: If fewer than two images were generated, or a value is not finite.
    """
    if len(measured.generated) < _MIN_IMAGES:
        raise DataError(
            f"got {len(measured.generated)} generated images for {len(measured.arrays['keys'])} "
            f"instances ({counted(measured.failures)}); expected at least {_MIN_IMAGES}; see "
            "instances.jsonl for the reasons"
        )
    with one_thread():
        part = _choose_part(measured)
        arrays = {name: to_float64(array) for name, array in measured.arrays.items()}
        paired = _paired_kid(arrays, measured, part)
        scores = _scores(arrays, measured, paired)
        deviations = _deviations(arrays, measured, part, scores)
        if paired is not None:
            deviations["kid_paired"] = paired.deviation
        return {
            "scores": scores,
            "intervals": _intervals(scores, _Evidence.of(measured, part, deviations)),
            "warnings": list(score_warnings(measured, scores, resolution, len(part.instances))),
        }


def instance_rows(measured: Measured) -> Iterator[dict[str, Any]]:
    """Yield a row per instance: its key, with its image's scores or the reason for having none."""
    places = {index: place for place, index in enumerate(measured.generated.tolist())}
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


def _scores(arrays: Arrays, measured: Measured, paired: PairedMmd | None) -> Scores:
    found = compute_scores(
        arrays["real_features"],
        arrays["features"],
        arrays.get("logits"),
        arrays["real_embeddings"][measured.generated],
        arrays["embeddings"],
        seed=_SEED,
    )
    recalls = {f"recall_{k}": 100 * float((measured.ranks <= k).mean()) for k in RECALLS}
    found |= {
        "kid_paired": None if paired is None else paired.value,
        "fid_clip": compute_fid(arrays["real_embeddings"], arrays["embeddings"]),
        "clip_t": None if measured.clip_t is None else float(measured.clip_t.mean()),
        **recalls,
        "num_negatives": min(NUM_NEGATIVES, len(measured.dialogs) - 1),
        "num_dialogs": measured.num_dialogs,
    }
    return found | dict.fromkeys(_constant(found, len(measured.generated)))


def _constant(scores: Scores, num_generated: int) -> Iterator[str]:
    """Yield the names of scores that would be the same for any images, and so mean nothing."""
    if scores["is_splits"] == num_generated:
        # In a split of one image, the mean class shares are its own: IS is 1.
        yield from ("is", "is_std")
    yield from (f"recall_{k}" for k in RECALLS if k > int(scores["num_negatives"] or 0))


@dataclass(frozen=True)
class _Part:
    """The instances that intervals are computed from: all, or some whole dialogs of very many.

    Args:
        instances: Their indices, in order.
        places: Positions of those with a generated image among all instances that have one.
        generated: Positions of the same instances in `instances`.
        scale: Factor from a deviation over these dialogs to one over all dialogs.
    """

    instances: NDArray[np.int64]
    places: NDArray[np.int64]
    generated: NDArray[np.int64]
    scale: float


def _choose_part(measured: Measured) -> _Part:
    """Choose all dialogs, or random ones up to `_MAX_RESAMPLED` instances."""
    num, scale = len(measured.dialogs), 1.0
    instances = np.arange(num)
    if num > _MAX_RESAMPLED:
        sizes = np.bincount(measured.dialogs)
        order = np.random.default_rng([_SEED, num]).permutation(len(sizes))
        chosen = order[np.cumsum(sizes[order]) <= _MAX_RESAMPLED]
        instances = np.flatnonzero(np.isin(measured.dialogs, chosen))
        # A deviation falls with the square root of the number of dialogs.
        scale = float(np.sqrt(len(chosen) / len(sizes)))
    places = np.flatnonzero(np.isin(measured.generated, instances))
    generated = np.searchsorted(instances, measured.generated[places])
    return _Part(instances, places, generated, scale)


def _paired_kid(arrays: Arrays, measured: Measured, part: _Part) -> PairedMmd | None:
    real = arrays["real_features"][measured.generated[part.places]]
    return paired_mmd(
        real, arrays["features"][part.places], measured.dialogs_of_generated[part.places]
    )


def _deviations(
    arrays: Arrays, measured: Measured, part: _Part, scores: Scores
) -> dict[str, float]:
    """Return the deviations of scores of sets (FID, IS), to first order in the dialogs' weights.

    A bootstrap needs a matrix decomposition per resample, and may take longer than generating.
    """

    def of_distance(real: str, fake: str) -> float:
        of_real, of_fake = fid_influences(arrays[real][part.instances], arrays[fake][part.places])
        contributions = of_real / len(of_real)
        contributions[part.generated] += of_fake / len(of_fake)
        return part.scale * total_deviation(contributions, measured.dialogs[part.instances])

    found = {
        "fid": of_distance("real_features", "features"),
        "fid_clip": of_distance("real_embeddings", "embeddings"),
    }
    if scores["is"] is not None:
        splits = int(scores["is_splits"] or 1)
        moved = inception_influences(arrays["logits"], splits, _SEED)
        found["is"] = total_deviation(moved / len(moved), measured.dialogs_of_generated)
    return found


@dataclass(frozen=True)
class _Evidence:
    """The inputs of intervals, by metric.

    Args:
        deviations: Of scores with a normal interval.
        means: (M,) the values that a score is the mean of.
        hits: (M,) True where an image counts towards a share.
        dialogs: (M,) the number of each image's dialog.
        num_classes: Classes of the extractor, None where it has none.
        part: The instances that intervals of means are computed from.
    """

    deviations: Mapping[str, float]
    means: Mapping[str, NDArray[np.float64]]
    hits: Mapping[str, NDArray[np.bool_]]
    dialogs: NDArray[np.int64]
    num_classes: int | None
    part: _Part

    @classmethod
    def of(cls, measured: Measured, part: _Part, deviations: Mapping[str, float]) -> _Evidence:
        means = {"clip_i": measured.clip_i}
        if measured.clip_t is not None:
            means["clip_t"] = measured.clip_t
        hits = {f"recall_{k}": measured.ranks <= k for k in RECALLS}
        logits = measured.arrays.get("logits")
        num_classes = None if logits is None else logits.shape[1]
        return cls(deviations, means, hits, measured.dialogs_of_generated, num_classes, part)

    def interval(self, spec: MetricSpec, value: float) -> Ends | None:
        """Return the interval of a score, of the kind that `spec` names, clipped to its bounds."""
        found: Ends | None = None
        if spec.interval == "normal":
            found = normal(value, self.deviations[spec.key])
        elif spec.interval == "wilson":
            low, high = wilson(self.hits[spec.key], self.dialogs)
            found = 100 * low, 100 * high
        elif spec.interval == "bca":
            found = self._of_mean(self.means[spec.key], value)
        if found is None:
            return None
        lowest, highest = spec.bounds
        if spec.needs == "classes" and self.num_classes is not None:
            highest = min(highest, self.num_classes)
        low, high = max(found[0], lowest), min(found[1], highest)
        # The distance of a set to itself is only rounding error, on either side of 0.
        return (low, high) if low < high else None

    def _of_mean(self, values: NDArray[np.float64], value: float) -> Ends | None:
        of_part = values[self.part.places]
        found = bca(of_part, self.dialogs[self.part.places])
        if found is None or self.part.scale == 1:
            return found
        mean, scale = float(of_part.mean()), self.part.scale
        return value + scale * (found[0] - mean), value + scale * (found[1] - mean)


def _intervals(scores: Scores, evidence: _Evidence) -> dict[str, list[float]]:
    """Return the interval of each score that has one."""
    found = {}
    for key, spec in METRICS.items():
        value = scores.get(key)
        interval = None if value is None else evidence.interval(spec, value)
        if interval is not None:
            found[key] = list(interval)
    return found
