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
from d2i.report.conversations import conversations_section, gallery, group_by_instances
from d2i.report.data_split import read_conversations
from d2i.report.document import OmittedSection, Section, render_page, tables_section
from d2i.report.evaluation import (
    MAX_NAMED,
    Evaluation,
    column_names,
    group_comparable,
    read_evaluation,
)
from d2i.report.linearization_tables import context_ablation, table3
from d2i.report.markdown_export import write_csv, write_markdown
from d2i.report.paper_rows import PUBLISHED_EXTRACTOR, paper_table2
from d2i.report.paper_tables import table2, table5
from d2i.report.preparation import preparation_section
from d2i.report.scores_section import scores_section
from d2i.report.table import Cell, Row, Table, is_number, rounded, without_blanks
from d2i.report.training import training_section

_CASES_TITLE = "Cases"
DEFAULT_TITLE = "d2i report"
_TIMES_TITLE = "Times"
_NUM_SHOWN = 4
_OTHER_EXTRACTOR = "Not comparable with published FIDs, which are on Inception."
_CATEGORIES = "Scores by category"


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
    systems, variants = _tables_of_paper(evaluations), table3(evaluations)
    ablations = context_ablation(evaluations)
    elsewhere = {row.card for t in (*systems, *variants, *ablations) for row in t.rows}
    sections = [
        conversations_section(evaluations),
        scores_section(evaluations, elsewhere),
        tables_section(
            *("table2", "Systems", systems), omitted="no evaluation is on PhotoChat or MMDialog"
        ),
        tables_section(
            *("table3", "Linearizations", variants),
            omitted="no system was evaluated with more than one linearization",
        ),
        tables_section(
            *("listening", "Context ablation", ablations),
            omitted="no system was evaluated with more than one value of --context",
        ),
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


def _tables_of_paper(evaluations: Sequence[Evaluation]) -> list[Table]:
    """Return Table 2 of the paper's corpora; on others, the scores stand side by side."""
    return table2([e for e in evaluations if paper_table2(str(e.card.get("corpus")))])


def _render(
    evaluations: Sequence[Evaluation], sections: Sequence[Section | OmittedSection], title: str
) -> str:
    card = evaluations[-1].card
    is_few = len(evaluations) <= MAX_NAMED
    warned = _warned(evaluations)
    cards = _cards(evaluations, warned) if is_few else []
    return render_page(
        "evaluation.html",
        title,
        sections,
        labels=[evaluation.proven_label for evaluation in evaluations],
        is_few=is_few,
        found=card.get("found") if is_number(card.get("found")) else None,
        split=str(card.get("data", "")).rstrip("/").rpartition("/")[2],
        cards=cards,
        cautions=[_caution(warning, names, evaluations) for warning, names in warned.items()],
    )


def _caution(warning: str, warned: Sequence[str], evaluations: Sequence[Evaluation]) -> str:
    """Name the systems that a warning applies to, unless it applies to all."""
    if len(warned) == len(evaluations):
        return f"{warning}."
    more = f" and {len(warned) - MAX_NAMED} more" if len(warned) > MAX_NAMED else ""
    return f"{'; '.join(warned[:MAX_NAMED])}{more}: {warning}."


def _warned(evaluations: Sequence[Evaluation]) -> dict[str, list[str]]:
    """Return each warning once, with the systems that it applies to."""
    of: dict[str, list[str]] = {}
    for name, evaluation in zip(column_names(evaluations), evaluations, strict=True):
        for warning in evaluation.warnings:
            of.setdefault(warning, []).append(name)
    return of


def _cards(evaluations: Sequence[Evaluation], warned: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Return the headline numbers; the warnings about one of them are moved beside it."""
    names = column_names(evaluations)
    found = [_accuracy(evaluations, names)]
    for key in ("fid", "clip_i"):
        card = _score(evaluations, names, key)
        if card:
            own = [warning for warning in warned if warning.startswith(f"{METRICS[key].title} ")]
            card["cautions"] += [_caution(w, warned.pop(w), evaluations) for w in own]
        found.append(card)
    return [card for card in found if card]


def _accuracy(evaluations: Sequence[Evaluation], names: Sequence[str]) -> dict[str, Any] | None:
    accuracies = [(evaluation.judged or {}).get("accuracy") for evaluation in evaluations]
    if not all(accuracies):
        return None
    shares = [accuracy["generated"] for accuracy in accuracies if accuracy]
    last, judged = accuracies[-1] or {}, evaluations[-1].judged or {}
    beside = [
        f"{name} {rounded(last[field], '.1%')}"
        for field, name in (("true", "reference images"), ("chance", "chance"))
        if is_number(last.get(field))
    ]
    beside += [
        f"{group} only {rounded(means['generated'], '.1%')}"
        for group, means in (judged.get("groups") or {}).items()
    ]
    return {
        "title": "Attribute accuracy",
        "values": list(zip(names, shares, [".1%"] * len(names), strict=True)),
        "note": f"read from the pixels by a rule; {', '.join(beside)}",
        "cautions": [],
    }


def _score(
    evaluations: Sequence[Evaluation], names: Sequence[str], key: str
) -> dict[str, Any] | None:
    values = [evaluation.scores.get(key) for evaluation in evaluations]
    if len(group_comparable(evaluations)) > 1 or not all(is_number(value) for value in values):
        return None
    metric, extractor = METRICS[key], evaluations[0].card.get("extractor", "?")
    beside = f"on {extractor}" if metric.is_on_extractor else metric.note
    is_own = metric.is_on_extractor and extractor != PUBLISHED_EXTRACTOR
    return {
        "title": metric.title,
        "values": [(name, v, metric.spec) for name, v in zip(names, values, strict=True)],
        "note": f"{metric.direction}; {beside}",
        "cautions": [_OTHER_EXTRACTOR] if is_own else [],
    }


def stages_section(times: Mapping[str, Any] | None) -> Section | OmittedSection:
    """Show the stages in order, each with its command, its time and its share of the total."""
    stages = [s for s in (times or {}).get("stages", []) if is_number(s.get("seconds"))]
    if not times or not stages:
        return OmittedSection(_TIMES_TITLE, "the stages were not timed; `d2i demo` times them")
    total_s = sum(stage["seconds"] for stage in stages)
    values = {"machine": times.get("machine"), "total_s": total_s, "stages": stages}
    return Section("times", _TIMES_TITLE, "stages.html", values, is_folded=True)


def cards_section(evaluations: Sequence[Evaluation]) -> Section | OmittedSection:
    """Show every field of every card and every score, unrounded, and mark those that differ."""
    cards = [dict(_flat({"scores": e.scores, "card": e.card})) for e in evaluations]
    rows = [
        Row(
            field,
            tuple(Cell(str(card.get(field, "absent")), is_code=True) for card in cards),
            differs=len({repr(card.get(field)) for card in cards}) > 1,
        )
        for field in dict.fromkeys(field for card in cards for field in card)
    ]
    differs = " A dot marks the fields that differ." if len(cards) > 1 else ""
    intro = f"Everything that the scores depend on, as stored in the files.{differs}"
    table = Table("", tuple(column_names(evaluations)), tuple(rows), corner="Field")
    return tables_section("cards", "Metric cards", [table], intro=intro, is_folded=True)


def _flat(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each leaf of nested JSON with its dotted name."""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def recipes_section(evaluations: Sequence[Evaluation]) -> Section | OmittedSection:
    """Show Table 5 if an evaluation is on one of the paper's corpora."""
    is_of_paper = any(paper_table2(str(e.card.get("corpus"))) for e in evaluations)
    reason = "no evaluation is on PhotoChat or MMDialog"
    tables = [table5()] if is_of_paper else []
    return tables_section("table5", "Recipes", tables, omitted=reason, is_folded=True)


def categories_section(evaluations: Sequence[Evaluation]) -> Section | OmittedSection:
    """Show Figure 5: the scores, and the first conversations that all systems kept images of."""
    chosen = labelled(evaluations)
    if not chosen:
        return OmittedSection(
            _CATEGORIES, "no evaluation is on PhotoChat, whose labels define the categories"
        )
    try:
        scored = [evaluation for evaluation in chosen if read_categories(evaluation)]
        tables = [without_blanks(table) for table in figure5(chosen)]
        if tables:
            values = {"tables": tables, "galleries": _galleries(scored)}
            return Section("figure5", _CATEGORIES, "categories.html", values)
    except DataError as error:
        return OmittedSection(_CATEGORIES, str(error))
    if scored:
        reason = "no label of the data set belongs to one of the categories"
    else:
        reason = "no evaluation has categories.json; eval/figure5.py writes it"
    return OmittedSection(_CATEGORIES, reason)


def _galleries(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """Show conversations of each category, for the systems evaluated on the same ones."""
    same = group_by_instances(evaluations)[0]
    shown = []
    for scores in (read_categories(same[0]) or {}).get("categories", ()):
        kept = {*scores["keys"]}.intersection(*(e.image_urls for e in same))
        found = read_conversations(str(same[0].card.get("data")), kept, _NUM_SHOWN)
        shown.append(gallery(found, same, name=scores["name"]))
    return shown
