"""Prepare MMDialog on Ray, whole or the paper's million instances. An example to copy and change.

python preprocess/mmdialog.py MMDialog data/mmdialog --recipe uvit-s-mmdialog
"""

import sys
from typing import Annotated

import typer

from d2i.cluster import Session
from d2i.preprocess.job import PreprocessRequest, preprocess
from d2i.preprocess.progress import JobProgress
from d2i.recipes import resolve_recipe


def show(progress: JobProgress) -> None:
    """Print the progress of the job."""
    print(progress.line(), file=sys.stderr)


def main(
    source: Annotated[str, typer.Argument(help="Directory with train/, valid/ and test/.")],
    out: Annotated[str, typer.Argument(help="Directory for the shards.")],
    recipe: Annotated[str, typer.Option(help="Recipe: resolution and encoders.")] = (
        "uvit-s-mmdialog"
    ),
    ray_address: Annotated[str | None, typer.Option(help="A running Ray cluster.")] = None,
) -> None:
    """Prepare a seeded million of the training split, and all of validation and test."""
    with Session(ray_address=ray_address) as session:
        for split, limit in (("train", 1_000_000), ("valid", None), ("test", None)):
            request = PreprocessRequest(
                corpus="mmdialog",
                source=source,
                out=out,
                recipe=resolve_recipe(recipe, []),
                split=split,
                limit=limit,
            )
            for summary in preprocess(request, session, show):
                print(summary)


if __name__ == "__main__":
    typer.run(main)
