"""The JSON member of a sample, for data sets that tests write."""

from __future__ import annotations

from typing import Any


def metadata(key: str, /, **fields: Any) -> dict[str, Any]:
    """Return all fields of a training sample with one context turn, overridden by those given."""
    source = {"ref": ["a.jpg"], "sha256": "0" * 64, "size_bytes": 1, "width": 1, "height": 1}
    return {
        "key": key,
        "split": "train",
        "dialog_id": "0",
        "turn": 1,
        "image": 0,
        "context": [{"speaker": 0, "text": "look"}],
        "direction": "answer",
        "description": None,
        "labels": [],
        "description_by": None,
        "source": source,
    } | fields
