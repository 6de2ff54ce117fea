"""What a training job is asked to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from d2i.config import Recipe
from d2i.fault import Fault


@dataclass(frozen=True)
class TrainRequest:
    """One training job, the same on every rank.

    Args:
        recipe: What decides the numbers.
        data_url: Folder made by d2i preprocess.
        run_url: The run directory, a path or an fsspec URL that all ranks share.
        zero: DeepSpeed's `zero_optimization` settings, in place of the bare stage.
        fault: For proofs.
    """

    recipe: Recipe
    data_url: str
    run_url: str
    zero: Mapping[str, Any] | None = None
    fault: Fault | None = None
