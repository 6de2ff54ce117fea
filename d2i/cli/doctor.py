"""The doctor command: checks of this machine."""

from __future__ import annotations

from dataclasses import asdict

import typer

from d2i.cli.options import JsonOption
from d2i.cli.output import print_result, row_line


def doctor(*, as_json: JsonOption = False) -> None:
    """Check what this machine can and cannot run, and print the fixes.

    Examples:

        d2i doctor

        d2i doctor --json
    """
    from d2i.doctor.machine import checks

    found = []
    for check in checks():
        found.append(asdict(check))
        if not as_json:
            typer.echo(row_line(check.status, check.name, check.detail, check.fix))
    if as_json:
        print_result({"checks": found}, [], as_json=True)
    if any(check["status"] == "fail" for check in found):
        raise typer.Exit(1)
