"""The recipes commands: list the presets, show one."""

from __future__ import annotations

from typing import Annotated

import typer

from d2i.cli.options import JsonOption, SetOption
from d2i.cli.output import print_result


def list_recipes(context: typer.Context, *, as_json: JsonOption = False) -> None:
    """List the recipes; 'd2i recipes show NAME' prints every setting of one.

    Examples:

        d2i recipes

        d2i recipes show uvit-s-photochat --set train.seed=1
    """
    if context.invoked_subcommand is not None:
        return
    from d2i.recipes import RECIPES

    described = {name: (build.__doc__ or "").splitlines()[0] for name, build in RECIPES.items()}
    lines = [f"{name:28} {description}" for name, description in described.items()]
    print_result({"recipes": described}, lines, as_json=as_json)


def show_recipe(
    name: Annotated[str, typer.Argument(help="A recipe's name, or package.module:function.")],
    settings: SetOption = None,
) -> None:
    """Print every setting of a recipe as JSON.

    Examples:

        d2i recipes show demo

        d2i recipes show uvit-s-mmdialog --set sample.num_steps=25
    """
    from d2i.recipes import resolve_recipe

    typer.echo(resolve_recipe(name, settings or []).model_dump_json(indent=1))
