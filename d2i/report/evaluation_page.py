"""The page of an evaluation: its header and sections, in order.

Each number of a table carries its exact value and its metric card.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from os import PathLike, fspath
from typing import Any

from d2i.errors import ConfigError, DataError
from d2i.io import storage
from d2i.metric_specs import METRICS
from d2i.report.attributes import attributes_section
from d2i.report.category_tables import figure5, labelled, read_categories
from d2i.report.conversations import conversations_section, group_by_instances, render_rows
from d2i.report.data_split import read_conversations
from d2i.report.document import render_document, render_header
from d2i.report.evaluation import (
    MAX_NAMED,
    Evaluation,
    column_names,
    group_comparable,
    read_evaluation,
)
from d2i.report.html import (
    OmittedSection,
    Section,
    card,
    duration,
    figure,
    is_number,
    percent,
    table,
    text,
)
from d2i.report.linearization_tables import context_ablation, table3
from d2i.report.markdown_export import write_csv, write_markdown
from d2i.report.paper_rows import paper_table2
from d2i.report.paper_tables import table2, table5
from d2i.report.preparation import preparation_section
from d2i.report.scores_section import scores_section
from d2i.report.table import Cell, Row, Table, shown
from d2i.report.training import training_section

_CASES_TITLE = "Cases"
DEFAULT_TITLE = "d2i report"
_SENTENCE = "From a conversation to the image that answers it"
_TIMES_TITLE = "Times"
_NUM_SHOWN = 4
_SYSTEMS, _LINEARIZATIONS = "Systems", "Linearizations"
_LISTENING, _CATEGORIES = "Context ablation", "Scores by category"


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


def page_header(evaluations: Sequence[Evaluation], title: str | None) -> str:
    """Render the heading, the evaluated systems, and up to three headline numbers."""
    cards = (
        [_accuracy(evaluations), _score(evaluations, "fid"), _score(evaluations, "clip_i")]
        if len(evaluations) <= MAX_NAMED
        else []
    )
    return render_header(title or DEFAULT_TITLE, _SENTENCE, _sentence(evaluations), "".join(cards))


def _sentence(evaluations: Sequence[Evaluation]) -> str:
    card = evaluations[-1].card
    found, data = card.get("found"), str(card.get("data", "")).rstrip("/")
    count = f"{figure(found, ',')} conversations" if is_number(found) else "conversations"
    split = f" of the {text(data.rpartition('/')[2])} split" if data else ""
    if len(evaluations) > MAX_NAMED:
        return f"{figure(len(evaluations), ',')} evaluations side by side."
    labels = [f"<strong>{text(evaluation.label)}</strong>" for evaluation in evaluations]
    systems = " and ".join(filter(None, [", then ".join(labels[:-1]), labels[-1]]))
    return f"Images generated for {count}{split} by {systems}."


def _accuracy(evaluations: Sequence[Evaluation]) -> str:
    accuracies = [(evaluation.judged or {}).get("accuracy") for evaluation in evaluations]
    if not all(accuracies):
        return ""
    shares = [accuracy["generated"] for accuracy in accuracies if accuracy]
    last = accuracies[-1] or {}
    beside = [
        f"{name} {percent(last[field])}"
        for field, name in (("true", "reference images"), ("chance", "chance"))
        if is_number(last.get(field))
    ]
    beside += [
        f"{text(group)} only {percent(means['generated'])}"
        for group, means in ((evaluations[-1].judged or {}).get("groups") or {}).items()
    ]
    note = f"read from the pixels by a rule; {', '.join(beside)}"
    return _card("Attribute accuracy", [percent(share) for share in shares], evaluations, note)


def _score(evaluations: Sequence[Evaluation], name: str) -> str:
    values = [evaluation.scores.get(name) for evaluation in evaluations]
    if len(group_comparable(evaluations)) > 1 or not all(is_number(value) for value in values):
        return ""
    metric = METRICS[name]
    extractor = evaluations[0].card.get("extractor", "?")
    beside = f"on {text(extractor)}" if metric.is_on_extractor else metric.note
    note = f"{metric.direction}; {beside}"
    shown = [figure(v, metric.spec) for v in values if v is not None]
    return _card(metric.title, shown, evaluations, note)


def _card(title: str, values: list[str], evaluations: Sequence[Evaluation], note: str) -> str:
    named = list(zip(column_names(evaluations), values, strict=True))
    return card(title, named, note, is_sequence=True)


def stages_section(times: Mapping[str, Any] | None) -> Section | OmittedSection:
    """Show the stages in order, each with its command, its time and its share of the total."""
    stages = [s for s in (times or {}).get("stages", []) if is_number(s.get("seconds"))]
    if not times or not stages:
        return OmittedSection(_TIMES_TITLE, "the stages were not timed; `d2i demo` times them")
    total_s = sum(stage["seconds"] for stage in stages)
    machine = f" on {text(times['machine'])}" if times.get("machine") else ""
    rows = "".join(_stage(stage, total_s) for stage in stages)
    intro = f'<p class="intro">{duration(total_s)} in total{machine}.</p>'
    return Section("times", _TIMES_TITLE, f'{intro}<ol class="stages">{rows}</ol>')


def _stage(stage: Mapping[str, Any], total_s: float) -> str:
    share = 100 * stage["seconds"] / total_s if total_s else 0.0
    command = f"<code>{text(stage['command'])}</code>" if stage.get("command") else ""
    details = [stage.get("detail"), "last attempt only" if stage.get("resumed") else None]
    detail = "".join(f'<span class="detail">{text(d)}</span>' for d in details if d)
    return (
        f'<li><div class="stage-head"><strong>{text(stage.get("name", "stage"))}</strong>{detail}'
        f'<span class="amount">{duration(stage["seconds"])}</span></div>'
        f'<div class="track" aria-hidden="true"><i class="bar last" style="width:{share:.2f}%"></i>'
        f"</div>{command}</li>"
    )


def cards_section(evaluations: Sequence[Evaluation]) -> Section:
    """Show every field of every card and every score, unrounded, and mark those that differ."""
    cards = [dict(_flat({"scores": e.scores, "card": e.card})) for e in evaluations]
    fields = dict.fromkeys(field for card in cards for field in card)
    rows = [
        (
            _marked(field, len({repr(card.get(field)) for card in cards}) > 1),
            [f"<code>{text(card.get(field, 'absent'))}</code>" for card in cards],
        )
        for field in fields
    ]
    differs = " A dot marks the fields that differ." if len(cards) > 1 else ""
    intro = (
        '<p class="intro">Everything that the scores depend on, as stored in the files.'
        f"{differs}</p>"
    )
    head = ["Field", *(text(name) for name in column_names(evaluations))]
    return Section("cards", "Metric cards", intro + table(head, rows))


def _flat(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each leaf of nested JSON with its dotted name."""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _marked(field: str, differs: bool) -> str:
    mark = '<span class="differs"><span class="hidden"> (differs)</span></span>' if differs else ""
    return text(field) + mark


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
