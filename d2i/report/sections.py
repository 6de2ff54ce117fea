"""Tables as sections of the page; each number carries its exact value and its metric card."""

from __future__ import annotations

from collections.abc import Sequence

from d2i.errors import DataError
from d2i.report.category_tables import figure5, labelled, read_categories
from d2i.report.conversations import group_by_instances, render_rows
from d2i.report.data_split import read_conversations
from d2i.report.evaluation import Evaluation
from d2i.report.html import OmittedSection, Section, table, text
from d2i.report.linearization_tables import context_ablation, table3
from d2i.report.paper_rows import paper_table2
from d2i.report.paper_tables import table2, table5
from d2i.report.table import Cell, Row, Table, shown

_NUM_SHOWN = 4
_SYSTEMS, _LINEARIZATIONS = "Systems", "Linearizations"
_LISTENING, _CATEGORIES = "Context ablation", "Scores by category"


def systems_section(evaluations: Sequence[Evaluation]) -> Section | OmittedSection:
    """Show Table 2."""
    tables = table2(evaluations)
    return _section("table2", _SYSTEMS, tables, "no metric card records its corpus")


def linearizations_section(evaluations: Sequence[Evaluation]) -> Section | OmittedSection:
    """Show Table 3."""
    reason = "no system was evaluated with more than one linearization"
    return _section("table3", _LINEARIZATIONS, table3(evaluations), reason)


def context_ablation_section(evaluations: Sequence[Evaluation]) -> Section | OmittedSection:
    """Show how the scores change when a system gets less than the whole dialog."""
    reason = "no system was evaluated with more than one value of --context"
    return _section("listening", _LISTENING, context_ablation(evaluations), reason)


def recipes_section(evaluations: Sequence[Evaluation]) -> Section | OmittedSection:
    """Show Table 5 if an evaluation is on one of the paper's corpora."""
    tables = [table5()] if any(paper_table2(str(e.card.get("corpus"))) for e in evaluations) else []
    return _section("table5", "Recipes", tables, "no evaluation is on PhotoChat or MMDialog")


def categories_section(evaluations: Sequence[Evaluation]) -> Section | OmittedSection:
    """Show Figure 5: the scores, and the first conversations that all systems kept images of."""
    chosen = labelled(evaluations)
    if not chosen:
        return OmittedSection(
            _CATEGORIES, "no evaluation is on PhotoChat, whose labels define the categories"
        )
    try:
        scored = [evaluation for evaluation in chosen if read_categories(evaluation)]
        tables = figure5(chosen)
        galleries = _galleries(scored) if tables else ""
    except DataError as error:
        return OmittedSection(_CATEGORIES, str(error))
    if not scored:
        return OmittedSection(
            _CATEGORIES, "no evaluation has categories.json; eval/figure5.py writes it"
        )
    if not tables:
        return OmittedSection(
            _CATEGORIES, "no label of the data set belongs to one of the categories"
        )
    return Section("figure5", _CATEGORIES, "".join(map(render_table, tables)) + galleries)


def render_table(made: Table) -> str:
    """Render a table with its notes."""
    rows = [(text(row.heading), [_cell(cell, row) for cell in row.cells]) for row in made.rows]
    notes = "".join(f'<p class="intro">{text(note)}</p>' for note in made.notes)
    return table(["", *map(text, made.columns)], rows, text(made.title)) + notes


def _section(
    anchor: str, title: str, tables: Sequence[Table], reason: str
) -> Section | OmittedSection:
    if not tables:
        return OmittedSection(title, reason)
    return Section(anchor, title, "".join(map(render_table, tables)))


def _cell(cell: Cell, row: Row) -> str:
    if cell.value is None:
        return ""
    label = text(shown(cell).replace("-", "\N{MINUS SIGN}"))
    if isinstance(cell.value, str):
        return text(cell.value)
    source = row.paper if cell.by_paper else row.card
    kind = ' class="paper"' if cell.by_paper else ""
    hover = text(f"{cell.value!r}; {source}")
    figure = f'<data{kind} value="{cell.value!r}" title="{hover}">{label}</data>'
    if cell.interval is None:
        return figure
    low, high = (format(end, cell.spec).replace("-", "\N{MINUS SIGN}") for end in cell.interval)
    return f"{figure} <small>{low} to {high}</small>"


def _galleries(evaluations: Sequence[Evaluation]) -> str:
    """Show conversations of each category, for the systems evaluated on the same ones."""
    same = group_by_instances(evaluations)[0]
    found = (read_categories(same[0]) or {}).get("categories", ())
    return "".join(_gallery(same, scores["name"], scores["keys"]) for scores in found)


def _gallery(evaluations: Sequence[Evaluation], name: str, keys: Sequence[str]) -> str:
    generated = {*keys}.intersection(*(e.image_urls for e in evaluations))
    shown_rows = read_conversations(str(evaluations[0].card.get("data")), generated, _NUM_SHOWN)
    return f"<h3>{text(name)}</h3>" + render_rows(shown_rows, evaluations)
