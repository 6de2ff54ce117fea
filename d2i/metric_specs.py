"""Every metric of an evaluation in one table: its key on disk, its words, and which way is better.

What prints, chooses or compares scores derives from `METRICS`; a new metric is a row here and its
computation in `d2i.eval.scores`. Must not import torch: reports and the command line read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Needs = Literal["features", "classes", "image embeddings", "text embeddings"]
"""What a metric is computed from: the extractor's features or its class logits, or CLIP's."""
Interval = Literal["normal"]


@dataclass(frozen=True)
class MetricSpec:
    """One metric.

    Args:
        key: Its key in `scores` and `intervals` of scores.json.
        title: Its name in the head of a table.
        long_title: Its name where there is room for a sentence.
        higher_is_better: Its direction.
        spec: How it is rounded, as a format specification.
        needs: What it is computed from.
        interval: How its 95 % confidence interval is made; None for no interval.
        std_key: Key of the deviation that is printed behind it, over subsets or splits.
        note: What a reader may want to know of its scale.
        on_page: Whether an evaluation's page prints it; a paper table always does.
    """

    key: str
    title: str
    long_title: str
    higher_is_better: bool
    spec: str
    needs: Needs
    interval: Interval | None = "normal"
    std_key: str | None = None
    note: str = ""
    on_page: bool = True

    @property
    def direction(self) -> str:
        """Say which way is better."""
        return f"{'higher' if self.higher_is_better else 'lower'} is better"

    @property
    def is_on_extractor(self) -> bool:
        """Whether its value depends on the feature extractor."""
        return self.needs in ("features", "classes")


RECALLS = (1, 5, 10)
"""The k of recall@k among negatives."""


def _recall(k: int, long_title: str, *, on_page: bool) -> MetricSpec:
    return MetricSpec(
        f"recall_{k}",
        f"recall@{k}",
        long_title,
        higher_is_better=True,
        spec=".1f",
        needs="image embeddings",
        on_page=on_page,
    )


_ROWS = (
    MetricSpec("fid", "FID", "FID", higher_is_better=False, spec=",.2f", needs="features"),
    MetricSpec(
        "kid", "KID", "KID", higher_is_better=False, spec=".4f", needs="features", std_key="kid_std"
    ),
    MetricSpec(
        "is",
        "IS",
        "Inception Score",
        higher_is_better=True,
        spec=".2f",
        needs="classes",
        std_key="is_std",
    ),
    MetricSpec(
        "clip_i",
        "CLIP-I",
        "CLIP-I",
        higher_is_better=True,
        spec=".2f",
        needs="image embeddings",
        note="100 is the true picture itself",
    ),
    MetricSpec(
        "clip_t", "CLIP-T", "CLIP-T", higher_is_better=True, spec=".2f", needs="text embeddings"
    ),
    MetricSpec(
        "fid_clip",
        "FID on CLIP",
        "FID on CLIP features",
        higher_is_better=False,
        spec=",.2f",
        needs="image embeddings",
    ),
    _recall(1, "Recall of the true picture, first", on_page=True),
    _recall(5, "Recall, among the first five", on_page=False),
    _recall(10, "Recall, among the first ten", on_page=True),
)
METRICS: dict[str, MetricSpec] = {spec.key: spec for spec in _ROWS}
"""All metrics by key, in the order of tables."""
PAPER_METRICS = tuple(METRICS[key] for key in ("fid", "is", "clip_i"))
"""The metrics of the paper's Tables 2 and 3."""
