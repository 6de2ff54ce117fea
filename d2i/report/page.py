"""The page of an evaluation: its sections, in their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from typing import Any

from d2i import storage
from d2i.errors import ConfigError
from d2i.report.attributes import attributes_section
from d2i.report.cards import cards_section
from d2i.report.conversations import conversations_section
from d2i.report.document import draw_document
from d2i.report.evaluation import Evaluation, read_evaluation
from d2i.report.hero import DEFAULT_TITLE, hero
from d2i.report.preparation import preparation_section
from d2i.report.scores import scores_section
from d2i.report.stages import stages_section
from d2i.report.training import training_section


def write_report(
    eval_dirs: Sequence[str | PathLike[str]],
    out_path: str | PathLike[str],
    *,
    times: Mapping[str, Any] | None = None,
    title: str | None = None,
) -> None:
    """Write the report of one evaluation or of several, side by side, as one HTML file.

    Every figure is read from the files of the evaluations, their runs and their data set; a part
    whose files are not there is left out and says why. The same files give the same bytes.

    Args:
        eval_dirs: Folders that `d2i eval` wrote, in the order to show them: before, then after.
        out_path: Where the HTML file goes; it appears complete.
        times: `{"stages": [{"name", "command", "seconds", "detail"}], "machine": str}`.
        title: What the page is called.

    Raises:
        ConfigError: If no folder is given.
        DataError: If a folder holds no finished evaluation, or a file is not what was promised.
    """
    if not eval_dirs:
        raise ConfigError("report: got no evaluation folder, expected at least one")
    evaluations = [read_evaluation(eval_dir) for eval_dir in eval_dirs]
    storage.write_bytes(fspath(out_path), _page(evaluations, times, title).encode())


def _page(
    evaluations: Sequence[Evaluation], times: Mapping[str, Any] | None, title: str | None
) -> str:
    sections = [
        conversations_section(evaluations),
        scores_section(evaluations),
        attributes_section(evaluations),
        training_section(evaluations),
        preparation_section(evaluations),
        stages_section(times),
        cards_section(evaluations),
    ]
    footer = "Every figure is read from the files of the run; rounded figures carry the exact one."
    return draw_document(title or DEFAULT_TITLE, hero(evaluations, title), sections, footer)
