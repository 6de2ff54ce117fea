"""Prepare PhotoChat on Ray: photographs by URL. An example to copy and change.

python preprocess/photochat.py photochat data/photochat --recipe uvit-s-photochat
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
    source: Annotated[str, typer.Argument(help="Directory with train/, dev/ and test/.")],
    out: Annotated[str, typer.Argument(help="Directory for the shards.")],
    recipe: Annotated[str, typer.Option(help="Recipe: resolution and encoders.")] = (
        "uvit-s-photochat"
    ),
    ray_address: Annotated[str | None, typer.Option(help="A running Ray cluster.")] = None,
) -> None:
    """Prepare all three splits; images that cannot be fetched are in the ledger, with a reason."""
    request = PreprocessRequest(
        corpus="photochat",
        source=source,
        out=out,
        recipe=resolve_recipe(recipe, []),
    )
    with Session(ray_address=ray_address) as session:
        for summary in preprocess(request, session, show):
            print(summary)


if __name__ == "__main__":
    typer.run(main)
