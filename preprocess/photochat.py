"""Prepare PhotoChat on Ray: photographs by address. Read it, copy it, change it.

python preprocess/photochat.py photochat data/photochat --recipe uvit-s-photochat
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
    source: Annotated[str, typer.Argument(help="Folder with train/, dev/ and test/.")],
    out: Annotated[str, typer.Argument(help="Folder of the shards.")],
    recipe: Annotated[str, typer.Option(help="Decides resolution and encoders.")] = (
        "uvit-s-photochat"
    ),
    ray_address: Annotated[str | None, typer.Option(help="A running cluster.")] = None,
) -> None:
    """Prepare all three splits; what cannot be fetched is in the ledger, with its reason."""
    request = PreprocessRequest(
        corpus="photochat",
        source=source,
        out=out,
        recipe=resolve_recipe(recipe, []),
        ray_address=ray_address,
    )
    for summary in preprocess(request, show):
        print(summary)


if __name__ == "__main__":
    typer.run(main)
