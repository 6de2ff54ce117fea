"""The page of an evaluation: its sections, in order."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from os import PathLike, fspath
from typing import Any

from d2i.errors import ConfigError
from d2i.io import storage
from d2i.report.attributes import attributes_section
from d2i.report.cards import cards_section
from d2i.report.category_tables import figure5
from d2i.report.conversations import conversations_section
from d2i.report.document import render_document
from d2i.report.evaluation import Evaluation, read_evaluation
from d2i.report.header import DEFAULT_TITLE, page_header
from d2i.report.html import OmittedSection, Section
from d2i.report.linearization_tables import context_ablation, table3
from d2i.report.markdown_export import write_csv, write_markdown
from d2i.report.paper_tables import table2, table5
from d2i.report.preparation import preparation_section
from d2i.report.scores_section import scores_section
from d2i.report.sections import (
    categories_section,
    context_ablation_section,
    linearizations_section,
    recipes_section,
    systems_section,
)
from d2i.report.stages import stages_section
from d2i.report.table import Table
from d2i.report.training import training_section

_CASES_TITLE = "Cases"


def write_report(
    eval_dirs: Sequence[str | PathLike[str]],
    out_path: str | PathLike[str],
    *,
    times: Mapping[str, Any] | None = None,
    title: str | None = None,
    parts: Collection[str] | None = None,
    cases: Sequence[str] = (),
) -> None:
    """Write the report of one or more evaluations: a page (.html), or its tables (.md, .csv).

    Every figure is read from the files of the evaluations, their runs and their data set. A section
    whose files are missing is left out, with the reason. The same files give the same bytes.

    Args:
        eval_dirs: Directories that `d2i eval` wrote, in the order to show them: before, then after.
        out_path: Path or URL of the file, which is published atomically.
        times: `{"stages": [{"name", "command", "seconds", "detail"}], "machine": str}`.
        title: Title of the page.
        parts: The sections of the page, by anchor (`table2`, `figure5`, ...); None for all.
        cases: Keys of instances: makes a page of these conversations with the images of all
            systems, as in the paper's Tables 4, 6 and 7, and the metric cards.

    Raises:
        ConfigError: If no directory is given, the file's suffix is none of the three, or cases are
            given and it is not .html.
        DataError: If a directory holds no finished evaluation, a file is not what an evaluation
            writes, or a case does not exist.
    """
    if not eval_dirs:
        raise ConfigError(
            "report: got no evaluation directory, expected at least one; pass those that d2i eval "
            "wrote"
        )
    suffix = fspath(out_path).rpartition(".")[2].lower()
    if suffix not in ("html", "md", "csv"):
        raise ConfigError(
            f"report: got {fspath(out_path)}, expected a file name ending in .html, .md or .csv"
        )
    if cases and suffix != "html":
        raise ConfigError(
            f"--case: got --out {fspath(out_path)}, expected a page, because cases are images; "
            "choose a file name ending in .html"
        )
    evaluations = [read_evaluation(eval_dir) for eval_dir in eval_dirs]
    if cases:
        section = conversations_section(evaluations, cases)
        sections = [section, cards_section(evaluations)]
        written = _render(evaluations, sections, title or _CASES_TITLE)
    elif suffix == "html":
        written = _page(evaluations, times, title, parts)
    else:
        written = (write_csv if suffix == "csv" else write_markdown)(_tables(evaluations))
    storage.write_bytes(fspath(out_path), written.encode())


def _tables(evaluations: Sequence[Evaluation]) -> list[Table]:
    return [
        *table2(evaluations),
        *table3(evaluations),
        *context_ablation(evaluations),
        table5(),
        *figure5(evaluations),
    ]


def _page(
    evaluations: Sequence[Evaluation],
    times: Mapping[str, Any] | None,
    title: str | None,
    parts: Collection[str] | None,
) -> str:
    sections = [
        conversations_section(evaluations),
        scores_section(evaluations),
        systems_section(evaluations),
        linearizations_section(evaluations),
        context_ablation_section(evaluations),
        categories_section(evaluations),
        attributes_section(evaluations),
        training_section(evaluations),
        preparation_section(evaluations),
        stages_section(times),
        recipes_section(evaluations),
        cards_section(evaluations),
    ]
    if parts is not None:
        sections = [s for s in sections if isinstance(s, Section) and s.anchor in parts]
    return _render(evaluations, sections, title or DEFAULT_TITLE)


def _render(
    evaluations: Sequence[Evaluation], sections: Sequence[Section | OmittedSection], title: str
) -> str:
    footer = (
        "All figures are read from the files of the run; hover over a rounded figure for its exact "
        "value."
    )
    return render_document(title, page_header(evaluations, title), sections, footer)
