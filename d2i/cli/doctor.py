"""The doctor command: checks of this machine, and of a pipeline's text."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from typing import Annotated

import typer

from d2i.cli.options import JsonOption
from d2i.cli.output import print_result, row_line


def doctor(
    *,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Directory of a diffusers pipeline, or its cached repository: also check that its "
            "text encoders read the newest turn of any dialog, and every message as text.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check what this machine can and cannot run, and print the fixes.

    Examples:

        d2i doctor

        d2i doctor --weights stable-diffusion-v1-5

        d2i doctor --json
    """
    from d2i.doctor.base_text import base_checks
    from d2i.doctor.machine import checks

    found = []
    for check in itertools.chain(checks(), base_checks(weights) if weights else ()):
        found.append(asdict(check))
        if not as_json:
            typer.echo(row_line(check.status, check.name, check.detail, check.fix))
    if as_json:
        print_result({"checks": found}, [], as_json=True)
    if any(check["status"] == "fail" for check in found):
        raise typer.Exit(1)
