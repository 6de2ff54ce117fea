"""The repair command."""

from __future__ import annotations

import dataclasses
from contextlib import closing
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
from d2i.cli.output import ProgressLine, print_result, problem_line


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
    """Repair broken or missing shards byte for byte. Exits with 1 if any remain.

    Intact files restore damaged ones; only lost samples are fetched and encoded again.

    Examples:

        d2i repair data

        d2i repair data/test --workers 0
    """
    from d2i.cluster import Session
    from d2i.fault_injection import parse_fault
    from d2i.preprocess.repair import RepairRequest
    from d2i.preprocess.repair import repair as run

    request = RepairRequest(directory, tuple(settings or ()))
    network_policy = network_policy_of(allow_host, dns_server, proxy)
    session = Session(workers, ray_address, parse_fault(fault), num_producers=fetch_workers)
    with session, closing(ProgressLine()) as progress:
        summaries = run(
            request,
            session,
            lambda done, total: progress.show(f"{done}/{total} shards rebuilt"),
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
