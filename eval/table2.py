"""Table 2: systems of every kind on one corpus, scored the same way, beside the paper's numbers.

python eval/table2.py data/mmdialog studies/table2 --system uvit-s=mscoco_uvit_small.pth \
  --system run:runs/uvit-s --system retrieve:data/mmdialog --system images:minigpt5
"""

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from d2i.cluster import Session
from d2i.errors import D2IError
from d2i.eval.generation_settings import choose_settings
from d2i.eval.job import EvalProgress, evaluate
from d2i.eval.request import EvalRequest
from d2i.eval.systems import parse_system
from d2i.recipes import change_recipe, read_stored_recipe
from d2i.report import write_report
from d2i.shards import data_set_url


def show(progress: EvalProgress) -> None:
    """Print the progress of an evaluation."""
    print(progress.line(), file=sys.stderr)


def main(
    data: Annotated[str, typer.Argument(help="Directory made by d2i preprocess.")],
    out: Annotated[
        Path, typer.Argument(help="Directory of the study; the same command resumes it.")
    ],
    system: Annotated[list[str], typer.Option(help="As in d2i eval; a backbone as NAME=WEIGHTS.")],
    selected: Annotated[
        list[str] | None,
        typer.Option(help="NAME=DIR: use what d2i select --system --out DIR chose for NAME."),
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE, for all systems.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="0: no Ray; default: fits the machine.")
    ] = None,
    ray_address: Annotated[str | None, typer.Option(help="A running Ray cluster.")] = None,
) -> None:
    """Evaluate each system, then write table2.html, table2.md and table2.csv."""
    directories = []
    choices = dict(choice.split("=", 1) for choice in selected or [])
    with Session(workers, ray_address) as session:
        for given in system:
            name, _, weights = given.partition("=")
            choice = choose_settings(
                name, setting or [], choices.get(name), weights=weights or None
            )
            recipe = change_recipe(read_stored_recipe(data), choice.settings)
            spec = parse_system(name, weights or None, recipe)
            directories.append(out / re.sub(r"[^A-Za-z0-9-]+", "-", given).strip("-"))
            request = EvalRequest(
                recipe=recipe,
                system=spec,
                data_url=data_set_url(data, "test"),
                out_url=str(directories[-1]),
                save_images="all",
                guidance_chosen_by=choice.guidance_by,
            )
            print(spec.label, evaluate(request, session, show)["scores"])
    for suffix in ("html", "md", "csv"):
        write_report(directories, out / f"table2.{suffix}", title="Systems")


if __name__ == "__main__":
    try:
        typer.run(main)
    except D2IError as err:
        print(f"table2: {err}", file=sys.stderr)
        sys.exit(2)
