"""The request of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from d2i.config import Recipe
from d2i.eval.prompts import ContextMode
from d2i.eval.system import SystemSpec
from d2i.eval.worker import SaveImages
from d2i.shards import ShardReader


@dataclass(frozen=True)
class EvalRequest:
    """The settings of one evaluation.

    Args:
        context: The part of a dialog that the system may read.
        label: The system's name in tables; `None` uses its own label.
        negatives: Directory of the corpus whose negative candidates are used for recall; `None`
            draws them by key hash. Does not affect images, and may be added after they are
            generated.
        guidance_chosen_by: The source of the guidance scale, as in `guidance.Choice`.
        task_size: Instances per task; `None` uses one compute batch. Does not affect any number.
        open_shards: Opens a data set in any process; picklable. Pass another than `ShardReader` to
            choose where local copies of remote shards are kept.
    """

    recipe: Recipe
    system: SystemSpec
    data_url: str
    out_url: str
    context: ContextMode = "full"
    save_images: SaveImages = "sample"
    label: str | None = None
    negatives: str | None = None
    guidance_chosen_by: Mapping[str, Any] = field(default_factory=dict)
    task_size: int | None = None
    open_shards: Callable[[str], ShardReader] = ShardReader
