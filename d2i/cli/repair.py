"""The repair command."""

from __future__ import annotations

import dataclasses
import time
from typing import Annotated

import typer

from d2i.cli.options import (
    AllowHostOption,
    DnsServerOption,
    FaultOption,
    FetchWorkersOption,
    JsonOption,
    ProxyOption,
    RayOption,
    SetOption,
    WorkersOption,
    network_policy_of,
)
from d2i.cli.output import print_result, problem_line
from d2i.cli.session import open_session
from d2i.io.progress_bar import Counts


def repair(
    directory: Annotated[str, typer.Argument(help="A directory made by d2i preprocess.")],
    allow_host: AllowHostOption = None,
    dns_server: DnsServerOption = None,
    proxy: ProxyOption = None,
    workers: WorkersOption = None,
    fetch_workers: FetchWorkersOption = None,
    ray_address: RayOption = None,
    settings: SetOption = None,
    *,
    as_json: JsonOption = False,
    fault: FaultOption = None,
) -> None:
    """Restore damaged or missing shards byte for byte.

    Intact files restore damaged ones; only lost samples are fetched and encoded again. Exits with 1
    if any damage is left.

    Examples:

        d2i repair d2i-demo/data

        d2i repair d2i-demo/data/test --workers 0
    """
    from d2i.preprocess.repair import RepairRequest
    from d2i.preprocess.repair import repair as run

    request = RepairRequest(directory, tuple(settings or ()))
    network_policy = network_policy_of(allow_host, dns_server, proxy)
    started = time.monotonic()
    with open_session(workers, ray_address, fault, num_producers=fetch_workers) as (
        session,
        progress,
    ):
        summaries = run(
            request,
            session,
            lambda done, total: progress.show(
                Counts(f"{done}/{total} shards rebuilt", done, total, "shards", started)
            ),
            network_policy=network_policy,
        )
    lines = []
    for summary in summaries:
        url = summary.folder
        problems = [dataclasses.asdict(p) | {"folder": url} for p in summary.problems]
        lines += [problem_line(problem) for problem in problems]
        lines += [f"{url}/{note}" for note in summary.notes]
        lines.append(
            f"{url}: {len(summary.mended)} files restored, {len(summary.made)} shards "
            f"rebuilt, {len(problems)} problems left"
        )
    result = {"data_sets": [dataclasses.asdict(summary) for summary in summaries]}
    print_result(result, lines, as_json=as_json)
    if any(summary.problems for summary in summaries):
        raise typer.Exit(1)
