"""Commands about the presets and this machine: recipes, doctor."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from d2i.cli.console import JsonOption, SetOption, help_text, print_result, register, row_line


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this module to the app."""
    recipes = typer.Typer(help="The presets.", invoke_without_command=True)
    recipes.callback(help=help_text(list_recipes))(list_recipes)
    register(recipes, show_recipe, "show")
    app.add_typer(recipes, name="recipes")
    register(app, doctor)


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
