"""METRICS has a row for every score, and a row suffices to render a metric in the report."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from d2i.eval.metrics.measured import Measured
from d2i.eval.metrics.scores import score
from d2i.metric_specs import METRICS, PAPER_METRICS
from d2i.report import paper_rows, paper_tables, scores_section
from d2i.report.document import render_page
from d2i.report.evaluation import Evaluation

# Keys of scores.json that are not metrics but how these were computed.
_SIZES = {"kid_subset_size", "is_splits", "num_negatives", "num_dialogs"}


def _measured(num: int = 12) -> Measured:
    generator = np.random.default_rng(0)
    of_images: dict[str, Any] = {
        name: generator.normal(size=(num, 6)).astype(np.float32)
        for name in ("features", "logits", "embeddings")
    }
    of_instances = {
        name: generator.normal(size=(num, 6)).astype(np.float32)
        for name in ("real_features", "real_embeddings", "text_embeddings")
    }
    texts = {
        "keys": np.array([f"k-{n}" for n in range(num)]),
        "reasons": np.full(num, ""),
        "sources": np.full(num, "memory"),
    }
    return Measured(of_images | of_instances | texts | {"is_flat": np.zeros(num, bool)})


def test_every_score_has_metric_spec() -> None:
    found = score(_measured(), resolution=8)
    named = set(METRICS) | {metric.std_key for metric in METRICS.values()} | _SIZES
    assert set(found["scores"]) <= named
    assert set(METRICS) <= set(found["scores"])
    assert set(found["intervals"]) <= {key for key, spec in METRICS.items() if spec.interval}


def test_added_metric_spec_is_rendered_in_report(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = replace(METRICS["clip_i"], key="toy", long_title="Toy score", higher_is_better=False)
    monkeypatch.setitem(METRICS, "toy", metric)
    evaluation = Evaluation(
        "a", {"toy": 12.34}, {"extractor": "clip"}, None, {}, {"toy": (11.0, 13.0)}
    )
    section = scores_section.scores_section([evaluation])
    page = render_page("samples.html", "a", [section], data_url="", num_shown=0, num_samples=0)
    row = page[page.index("Toy score") :]
    assert row.index("lower is better") < row.index("12.3") < row.index(">11.00<")


def test_table2_has_column_for_each_paper_metric() -> None:
    columns = paper_tables.table2([_photochat_evaluation()])[0].columns
    for metric in PAPER_METRICS:
        column = columns.index(metric.title)
        assert columns[column + 1] == f"{metric.title} (paper)"
    assert paper_rows.paper_table2("photochat")["U-ViT-Small"] == {
        "fid": (97.76, None),
        "is": (10.8, 0.6),
        "clip_i": (56.61, None),
    }


def _photochat_evaluation() -> Evaluation:
    card = {"corpus": "photochat", "extractor": paper_rows.PUBLISHED_EXTRACTOR, "context": "full"}
    return Evaluation("a", {}, card, None, {})
