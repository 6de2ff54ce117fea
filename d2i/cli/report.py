"""The report command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2i.cli.options import (
    JsonOption,
)
from d2i.cli.output import print_result
from d2i.errors import ConfigError


def report(
    evaluations: Annotated[
        list[str], typer.Argument(help="Directories made by d2i eval, in order.")
    ],
    out: Annotated[
        str, typer.Option(help="A page (.html), or its tables alone (.md, .csv); path or URL.")
    ] = "report.html",
    times: Annotated[
        Path | None, typer.Option(help="File of stage times that d2i demo writes.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="The page's title.")] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(help="Show only the instance of this key; may be repeated."),
    ] = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Write a page with images, scores and the paper's tables.

    It is one self-contained HTML file: conversations, images, scores and their provenance.

    The paper's tables, with our numbers beside its own, are built from all given evaluations:
    systems by corpus, linearizations, contexts, people, food and animals, recipes. eval/README.md
    defines which systems fill the paper's own rows. With --case the page shows the given
    conversations, as the paper's Tables 4, 6 and 7; keys are in instances.jsonl and on the page.

    Examples:

        d2i report d2i-demo/eval/before d2i-demo/eval/after --out report.html

        d2i report d2i-demo/eval/before d2i-demo/eval/after --out tables.csv

        d2i report scores/before scores/after --case test-7-3-0 --out cases.html
    """
    from d2i.io.parse import read_json
    from d2i.report import write_report

    try:
        measured = read_json(str(times), error=ConfigError) if times else None
    except OSError as err:
        raise ConfigError(
            f"--times {times}: {err}; expected the JSON that d2i demo writes"
        ) from err
    write_report(evaluations, out, times=measured, title=title, cases=case or ())
    print_result({"report": out}, [out], as_json=as_json)
