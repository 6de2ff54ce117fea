"""The recipes commands: list the presets, show one."""

from __future__ import annotations

from typing import Annotated

import typer

from d2i.cli.completion import complete_recipe
from d2i.cli.options import RECIPE_HELP, JsonOption, SetOption
from d2i.cli.output import print_result


def list_recipes(context: typer.Context, *, as_json: JsonOption = False) -> None:
    """List the recipes, or show every setting of one.

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
    name: Annotated[str, typer.Argument(help=RECIPE_HELP, autocompletion=complete_recipe)],
    settings: SetOption = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Print every setting of a recipe, with its explanation.

    The TOML, redirected to a file and edited, is a recipe of your own: --recipe FILE.toml.

    Examples:

        d2i recipes show demo

        d2i recipes show own.toml --json

        d2i recipes show uvit-s-mmdialog --set sample.num_steps=25
    """
    from d2i.recipe_file import to_toml
    from d2i.recipes import resolve_recipe

    recipe = resolve_recipe(name, settings or [])
    if as_json:
        print_result(recipe.model_dump(mode="json"), [], as_json=True)
    else:
        typer.echo(to_toml(recipe), nl=False)
