"""The doctor command: checks of this machine, of a pipeline's text and of a recipe's memory."""

from __future__ import annotations

import itertools
from typing import Annotated

import typer

from d2i.cli.completion import complete_recipe
from d2i.cli.options import RECIPE_HELP, JsonOption, SetOption
from d2i.cli.output import print_checks


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
    recipe: Annotated[
        str | None,
        typer.Option(
            help=f"Also reckon the memory of training it. {RECIPE_HELP}",
            autocompletion=complete_recipe,
        ),
    ] = None,
    settings: SetOption = None,
    num_accelerators: Annotated[
        int, typer.Option(min=1, help="Number of ranks that train the recipe.")
    ] = 1,
    memory_gb: Annotated[
        float | None,
        typer.Option(min=0, help="Memory of one GPU, in 1e9 bytes; by default, of this machine's."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check what this machine can run, and print the fixes.

    Examples:

        d2i doctor

        d2i doctor --weights stable-diffusion-v1-5

        d2i doctor --recipe sd15-photochat --num-accelerators 8 --memory-gb 24

        d2i doctor --json
    """
    from d2i.doctor.base_text import base_checks
    from d2i.doctor.machine import checks
    from d2i.doctor.recipe_memory import memory_checks

    asked = [checks()]
    if weights:
        asked.append(base_checks(weights))
    if recipe:
        asked.append(memory_checks(recipe, settings or [], num_accelerators, memory_gb))
    print_checks(itertools.chain.from_iterable(asked), as_json=as_json)
