"""Prepare MMDialog on Ray, whole or the paper's million instances. Read it, copy it, change it.

python preprocess/mmdialog.py MMDialog data/mmdialog --recipe uvit-s-mmdialog
"""

import sys
from typing import Annotated

import typer

from d2i.preprocess.job import JobProgress, PreprocessRequest, preprocess
from d2i.recipes import resolve_recipe


def show(progress: JobProgress) -> None:
    """Print how far the job is."""
    print(progress.line(), file=sys.stderr)


def main(
    source: Annotated[str, typer.Argument(help="Folder with train/, valid/ and test/.")],
    out: Annotated[str, typer.Argument(help="Folder of the shards.")],
    recipe: Annotated[str, typer.Option(help="Decides resolution and encoders.")] = (
        "uvit-s-mmdialog"
    ),
    ray_address: Annotated[str | None, typer.Option(help="A running cluster.")] = None,
) -> None:
    """Prepare the training split's seeded million, and validation and test whole."""
    for split, limit in (("train", 1_000_000), ("valid", None), ("test", None)):
        request = PreprocessRequest(
            corpus="mmdialog",
            source=source,
            out=out,
            recipe=resolve_recipe(recipe, []),
            split=split,
            limit=limit,
            ray_address=ray_address,
        )
        for summary in preprocess(request, show):
            print(summary)


if __name__ == "__main__":
    typer.run(main)
