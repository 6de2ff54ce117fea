"""Printed output of the commands: results, rows of counts and of checks."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from d2i.io.terminal import plain

if TYPE_CHECKING:
    from d2i.cluster.estimate import Forecast
    from d2i.doctor.check import Check

INTERRUPTED = 130
"""The exit code after Ctrl-C."""
_GIB = 2**30


def print_result(result: dict[str, Any], lines: Iterable[str], *, as_json: bool) -> None:
    """Print a command's result: one JSON line for machines, or lines for people."""
    if as_json:
        typer.echo(json.dumps(result, sort_keys=True))
        return
    for line in lines:
        typer.echo(plain(line))


def print_checks(checks: Iterable[Check], *, as_json: bool) -> None:
    """Print the rows of a check as they come, or all as one JSON line.

    Raises:
        typer.Exit: With code 1 if one of them failed.
    """
    found = []
    for check in checks:
        found.append(asdict(check))
        if not as_json:
            typer.echo(row_line(check.status, check.name, check.detail, check.fix))
    print_result({"checks": found}, [], as_json=as_json)
    if any(check["status"] == "fail" for check in found):
        raise typer.Exit(1)


def row_line(status: str, name: str, detail: str, fix: str) -> str:
    """Return one row of a check's report, with the fix if one is needed."""
    return plain(f"{status:5} {name}: {detail}" + (f"  -> {fix}" if fix else ""))


def counted(counts: dict[str, int]) -> str:
    """Return `2 missing_file, 1 decode_error`, or `none`."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{number} {name}" for name, number in ordered) or "none"


def problem_line(problem: dict[str, Any]) -> str:
    """Return the line of a problem in prepared data: file, reason and detail."""
    return f"{problem['folder']}/{problem['file']}: {problem['reason']}: {problem['detail']}"


def forecast_lines(found: Forecast) -> list[str]:
    """Return the printed lines of a forecast."""
    work, offer = found.work, found.offer
    rate = "" if found.items_per_s is None else f"{found.items_per_s:.3g} instances/s per worker, "
    lines = [
        f"remaining: {work.num_items} instances in {work.num_tasks} tasks",
        f"workers: {found.num_workers} (one {offer.unit} each), nodes: {offer.num_nodes}, "
        f"rounds: {found.num_rounds}",
        f"rate: {rate}{found.rate_from}",
    ]
    if found.bytes_in_flight:
        lines.append(_memory_line(found.bytes_in_flight, offer.object_store_bytes))
    if found.time_s is not None:
        cost = "" if found.cost is None else f", cost: {found.cost:.2f}"
        lines.append(f"time: {_duration(found.time_s)} plus start-up{cost}")
    return lines


def _memory_line(in_flight: int, held: int) -> str:
    there = f"; the object stores hold {held / _GIB:.1f} GiB" if held else ""
    return f"memory: at most {in_flight / _GIB:.2f} GiB of images in flight{there}"


def _duration(time_s: float) -> str:
    return f"{time_s:.0f} s" if time_s < 600 else f"{time_s / 3600:.1f} h"
