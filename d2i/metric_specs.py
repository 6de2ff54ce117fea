"""Table of the metrics of an evaluation: the key on disk, titles and direction of each.

Code that prints, selects by or compares scores derives from `METRICS`; a new metric is a row here
and its computation in `d2i.eval.metrics.scores`. Must not import torch: reports and the command
line read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal

Needs = Literal["features", "classes", "image embeddings", "text embeddings"]
"""The input of a metric: the extractor's features or its class logits, or CLIP's embeddings."""
Interval = Literal["normal", "bca", "wilson"]
"""The kind of a 95 % confidence interval, all of them over dialogs (`d2i.eval.metrics.intervals`):
the score plus and minus 1.96 deviations, clipped to the metric's bounds; for a mean over images the
BCa bootstrap (Efron 1987); for a share of images Wilson's interval."""


@dataclass(frozen=True)
class MetricSpec:
    """One metric.

    Args:
        key: Its key in `scores` and `intervals` of scores.json.
        title: Its name in the header of a table.
        long_title: Its name where there is room for a sentence.
        higher_is_better: Its direction.
        spec: The format specification that rounds it.
        needs: Its input.
        interval: The kind of its 95 % confidence interval; None if it has none.
        bounds: Lowest and highest possible value; an interval never leaves them. The Inception
            Score is bounded by the number of classes as well.
        std_key: Key of the deviation that is printed after it, over subsets or splits.
        note: A hint on its scale for the reader.
        on_page: True if an evaluation's page shows it; a paper table always does.
    """

    key: str
    title: str
    long_title: str
    higher_is_better: bool
    spec: str
    needs: Needs
    interval: Interval | None
    bounds: tuple[float, float] = (-inf, inf)
    std_key: str | None = None
    note: str = ""
    on_page: bool = True

    @property
    def direction(self) -> str:
        """The direction in words: `higher is better` or `lower is better`."""
        return f"{'higher' if self.higher_is_better else 'lower'} is better"

    def can_be_interval(self, ends: Sequence[float]) -> bool:
        """Return whether low and high can be its interval; those of older evaluations may not."""
        low, high = ends
        lowest, highest = self.bounds
        return self.interval is not None and lowest <= low < high <= highest

    @property
    def is_on_extractor(self) -> bool:
        """True if its value depends on the feature extractor."""
        return self.needs in ("features", "classes")


RECALLS = (1, 5, 10)
"""The k of recall@k among negatives."""


_PERCENT = (0.0, 100.0)
_COSINE = (-100.0, 100.0)
_DISTANCE = (0.0, inf)


def _recall(k: int, long_title: str, *, on_page: bool) -> MetricSpec:
    return MetricSpec(
        f"recall_{k}",
        f"recall@{k}",
        long_title,
        higher_is_better=True,
        spec=".1f",
        needs="image embeddings",
        interval="wilson",
        bounds=_PERCENT,
        on_page=on_page,
    )


_ROWS = (
    MetricSpec(
        "fid",
        "FID",
        "FID",
        higher_is_better=False,
        spec=",.2f",
        needs="features",
        interval="normal",
        bounds=_DISTANCE,
    ),
    MetricSpec(
        "kid",
        "KID",
        "KID",
        higher_is_better=False,
        spec=".4f",
        needs="features",
        interval=None,
        std_key="kid_std",
        note="torch-fidelity's number, biased below 0 where both images are of the same dialogs",
    ),
    MetricSpec(
        "kid_paired",
        "paired KID",
        "Paired KID",
        higher_is_better=False,
        spec=".4f",
        needs="features",
        interval="normal",
        note="unbiased where both images are of the same dialogs; may fall a little below 0",
    ),
    MetricSpec(
        "is",
        "IS",
        "Inception Score",
        higher_is_better=True,
        spec=".2f",
        needs="classes",
        interval="normal",
        bounds=(1.0, inf),
        std_key="is_std",
    ),
    MetricSpec(
        "clip_i",
        "CLIP-I",
        "CLIP-I",
        higher_is_better=True,
        spec=".2f",
        needs="image embeddings",
        interval="bca",
        bounds=_COSINE,
        note="100 is the reference image itself",
    ),
    MetricSpec(
        "clip_t",
        "CLIP-T",
        "CLIP-T",
        higher_is_better=True,
        spec=".2f",
        needs="text embeddings",
        interval="bca",
        bounds=_COSINE,
    ),
    MetricSpec(
        "fid_clip",
        "FID on CLIP",
        "FID on CLIP features",
        higher_is_better=False,
        spec=",.2f",
        needs="image embeddings",
        interval="normal",
        bounds=_DISTANCE,
    ),
    _recall(1, "Recall@1 of the reference image", on_page=True),
    _recall(5, "Recall@5 of the reference image", on_page=False),
    _recall(10, "Recall@10 of the reference image", on_page=True),
)
METRICS: dict[str, MetricSpec] = {spec.key: spec for spec in _ROWS}
"""All metrics by key, in the order of tables."""
PAPER_METRICS = tuple(METRICS[key] for key in ("fid", "is", "clip_i"))
"""The metrics of the paper's Tables 2 and 3."""
