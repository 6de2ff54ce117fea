"""Metrics: scores from features, their confidence intervals and warnings."""

from d2i.eval.metrics.compute import compute_scores

__all__ = ["compute_scores"]
