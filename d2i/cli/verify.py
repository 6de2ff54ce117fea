"""The verify command."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from d2i.cli.options import (
    JsonOption,
)
from d2i.cli.output import ProgressLine, print_result, problem_line


def verify(
    directory: Annotated[str, typer.Argument(help="A directory made by d2i preprocess.")],
    *,
    as_json: JsonOption = False,
) -> None:
    """Verify every byte of shards, plan and ledger. Exits with 1 if any is damaged or missing.

    Examples:

        d2i verify data

        d2i verify data/test
    """
    from d2i.preprocess.job_files import check_job_files
    from d2i.shards import find_data_sets
    from d2i.shards import verify as verify_shards

    progress = ProgressLine()
    problems: list[dict[str, str]] = []
    num_samples = num_shards = 0
    for url in find_data_sets(directory):
        report = verify_shards(
            url, on_progress=lambda done, total: progress.show(f"{done}/{total}")
        )
        found = [*report.problems, *check_job_files(url)]
        problems += [dataclasses.asdict(p) | {"folder": url} for p in found]
        num_samples, num_shards = num_samples + report.num_samples, num_shards + report.num_shards
    progress.close()
    lines = [problem_line(problem) for problem in problems]
    lines.append(f"{num_samples} samples in {num_shards} shards, {len(problems)} problems")
    print_result(
        {"num_samples": num_samples, "num_shards": num_shards, "problems": problems},
        lines,
        as_json=as_json,
    )
    if problems:
        raise typer.Exit(1)
