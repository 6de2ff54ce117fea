"""Warnings about the scores of an evaluation, one line each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from d2i.eval.metrics.measured import Measured
from d2i.eval.metrics.retrieval_recall import NUM_NEGATIVES
from d2i.metric_specs import RECALLS

# Inception's features have 2048 dimensions: with fewer images the covariance lacks full rank.
_FEW_IMAGES = 2048
# Our thresholds: the number of images in a split bounds IS; intervals over fewer dialogs cover less
# than 93 % instead of 95 %; with fewer negatives chance alone gives a recall@10 over 10 %.
_FEW_IN_SPLIT = 100
_FEW_DIALOGS = 20
_FEW_NEGATIVES = 99


def score_warnings(
    measured: Measured,
    scores: Mapping[str, float | int | None],
    resolution: int,
    num_resampled: int,
) -> Iterator[str]:
    """Yield warnings about too few images, dialogs or negatives, and about the images themselves.

    Args:
        measured: All measurements of an evaluation.
        scores: Its scores, with `is_splits` and `num_negatives`; None means not scored.
        resolution: The side in pixels at which the images were measured.
        num_resampled: The number of instances that intervals are computed from.
    """
    num_generated, keys = len(measured.generated), measured.arrays["keys"]
    yield from _fid_warnings(measured)
    yield from _inception_warnings(scores, num_generated)
    yield from _recall_warnings(int(scores["num_negatives"] or 0))
    yield from _dialog_warnings(measured.num_dialogs)
    if measured.failures:
        yield (
            f"{num_generated} of {len(keys)} instances have an image "
            f"({counted(measured.failures)}); the others are left out, not replaced"
        )
    if num_resampled < len(keys):
        yield (
            f"intervals are computed from {num_resampled} of {len(keys)} instances (whole "
            "dialogs) and scaled to all; paired KID is of those instances only"
        )
    if measured.listed and (number := measured.listed.mean_number) < NUM_NEGATIVES:
        yield (
            f"of the {NUM_NEGATIVES} negatives that {measured.listed.source} lists per dialog, "
            f"{number:.1f} on average are in the data set; the others are drawn by key hash"
        )
    flat = np.flatnonzero(measured.arrays["is_flat"])
    if len(flat):
        yield f"images of a single colour: {len(flat)}, the first is that of {keys[flat[0]]}"
    if (
        num_generated > 1
        and (measured.arrays["embeddings"] == measured.arrays["embeddings"][0]).all()
    ):
        yield "all images have the same CLIP embedding: the system generates one image for all"
    yield from _source_warnings(measured.sources, resolution)


def _fid_warnings(measured: Measured) -> Iterator[str]:
    num, width = measured.arrays["features"].shape
    if num < _FEW_IMAGES:
        rank = f"; its covariance has rank {num - 1} of {width}" if num <= width else ""
        yield (
            f"FID on {num} images is noisy and biased (use {_FEW_IMAGES:,} or more){rank}; compare "
            "only scores on the same number of images"
        )


def _inception_warnings(
    scores: Mapping[str, float | int | None], num_generated: int
) -> Iterator[str]:
    splits = scores["is_splits"]
    if splits is None:
        return
    fewest = num_generated // int(splits)
    if scores["is"] is None:
        yield (
            f"IS is not scored: each of {splits} splits of {num_generated} images has one image, "
            "for which IS is always 1"
        )
    elif fewest < _FEW_IN_SPLIT:
        yield (
            f"IS over {splits} splits of {fewest} images is biased low and cannot exceed "
            f"{-(-num_generated // int(splits))}; compare only scores on the same number of images"
        )


def _recall_warnings(num_negatives: int) -> Iterator[str]:
    if constant := [k for k in RECALLS if k > num_negatives]:
        names = " and ".join(f"recall@{k}" for k in constant)
        yield (
            f"{names} not scored: with {num_negatives} negatives every rank is within the first "
            f"{constant[0]}"
        )
    scored = [k for k in RECALLS if k <= num_negatives]
    if scored and num_negatives < _FEW_NEGATIVES:
        by_chance = 100 * scored[-1] / (num_negatives + 1)
        yield (
            f"recall is among {num_negatives} negatives instead of {NUM_NEGATIVES}: recall@"
            f"{scored[-1]} by chance is {by_chance:.0f} %"
        )


def _dialog_warnings(num_dialogs: int) -> Iterator[str]:
    if num_dialogs == 1:
        yield "all images are of one dialog: the variation of scores between dialogs is unknown"
    elif num_dialogs < _FEW_DIALOGS:
        yield (
            f"scores over {num_dialogs} dialogs are unreliable, and their intervals too narrow "
            f"(use {_FEW_DIALOGS} dialogs or more)"
        )


def _source_warnings(sources: list[str], resolution: int) -> Iterator[str]:
    files = [source.split() for source in sources if " " in source]
    codecs, sizes = {form for form, _ in files}, {size for _, size in files}
    if "jpg" in codecs:
        yield "some images were read from JPEG, whose artefacts affect the scores; prefer PNG"
    if len(codecs) > 1:
        yield f"the images have different codecs ({', '.join(sorted(codecs))}); expected one"
    if len(sizes) > 1:
        shown = ", ".join(sorted(sizes)[:3])
        yield f"the images have {len(sizes)} sizes ({shown}); each was resized separately"
    if small := sorted(size for size in sizes if min(map(int, size.split("x"))) < resolution):
        yield (
            f"images of {small[0]} were upscaled to {resolution}x{resolution}: their lack of "
            "detail affects the scores"
        )


def counted(failures: Mapping[str, int]) -> str:
    """Format the number of failures by reason as text."""
    return ", ".join(f"{number} {reason}" for reason, number in failures.items()) or "no failures"
