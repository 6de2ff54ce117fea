"""Table 3: one system on the four linearizations; only the text is encoded anew.

python eval/table3.py data/photochat studies/table3 --system run:runs/unidiffuser
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from d2i.dialog import TEMPLATES
from d2i.eval.job import EvalProgress, EvalRequest, evaluate, test_url
from d2i.eval.systems import parse_system
from d2i.recipes import change_recipe, read_kept_recipe
from d2i.report import write_report


def show(progress: EvalProgress) -> None:
    """Print how far an evaluation is."""
    print(progress.line(), file=sys.stderr)


def main(
    data: Annotated[str, typer.Argument(help="Folder made by d2i preprocess.")],
    out: Annotated[Path, typer.Argument(help="Folder of the study; the same command resumes.")],
    system: Annotated[str, typer.Option(help="As d2i eval takes it.")],
    weights: Annotated[str | None, typer.Option(help="Weights of a backbone.")] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE.")] = None,
    workers: Annotated[int | None, typer.Option(help="0: no Ray; else fits the machine.")] = None,
    ray_address: Annotated[str | None, typer.Option(help="A running cluster.")] = None,
) -> None:
    """Evaluate the system on each linearization, then write table3.html, .md and .csv."""
    folders = []
    for strategy in TEMPLATES:
        changes = [*(setting or []), f"text.strategy={strategy}"]
        recipe = change_recipe(read_kept_recipe(data), changes)
        folders.append(out / strategy)
        request = EvalRequest(
            recipe=recipe,
            system=parse_system(system, weights, recipe),
            data_url=test_url(data),
            out_url=str(folders[-1]),
            num_workers=workers,
            ray_address=ray_address,
        )
        print(strategy, evaluate(request, show)["scores"])
    for suffix in ("html", "md", "csv"):
        write_report(folders, out / f"table3.{suffix}", title="Linearizations")


if __name__ == "__main__":
    typer.run(main)
