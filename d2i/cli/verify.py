"""The verify command."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import closing
from typing import Annotated

import typer

from d2i.cli.options import JsonOption
from d2i.cli.output import print_result, problem_line
from d2i.io.progress_bar import Counts, ProgressBar


def verify(
    directory: Annotated[
        str, typer.Argument(help="A directory made by d2i preprocess, or indexed by d2i index.")
    ],
    *,
    as_json: JsonOption = False,
) -> None:
    """Verify every byte of prepared data.

    Shards, plan and ledger are compared with their checksums, and tars that d2i did not write with
    the index of 'd2i index'. Exits with 1 if any is damaged or missing.

    Examples:

        d2i verify d2i-demo/data

        d2i verify d2i-demo/data/test
    """
    from d2i.preprocess.job_files import check_job_files
    from d2i.shards import find_data_sets, is_indexed
    from d2i.shards import verify as verify_shards

    problems: list[dict[str, str]] = []
    num_samples = num_shards = 0
    with closing(ProgressBar()) as progress:
        for url in find_data_sets(directory):
            report = verify_shards(url, on_progress=_showing(progress, url))
            found = [*report.problems, *([] if is_indexed(url) else check_job_files(url))]
            problems += [dataclasses.asdict(p) | {"folder": url} for p in found]
            num_samples += report.num_samples
            num_shards += report.num_shards
    lines = [problem_line(problem) for problem in problems]
    lines.append(f"{num_samples} samples in {num_shards} shards, {len(problems)} problems")
    print_result(
        {"num_samples": num_samples, "num_shards": num_shards, "problems": problems},
        lines,
        as_json=as_json,
    )
    if problems:
        raise typer.Exit(1)


def _showing(progress: ProgressBar, url: str) -> Callable[[int, int], None]:
    """Return a function that shows the shards done of a data set."""
    started = time.monotonic()

    def show(done: int, total: int) -> None:
        progress.show(Counts(f"{done}/{total}", done, total, "shards", started, note=url))

    return show
