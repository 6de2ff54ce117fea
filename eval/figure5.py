"""Figure 5: people, food and animals, from finished evaluations of PhotoChat.

python eval/figure5.py scores/before scores/after --out figure5.html

FID and IS over 20 seeded draws of 50 images per category, KID and CLIP-I over all; with
--save-images all, also conversations of each. PhotoChat's labels give an image's category.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from d2i.corpora import has_categories
from d2i.errors import D2IError
from d2i.eval.metrics.category_scores import CATEGORIES_NAME, write_categories
from d2i.report import write_report
from d2i.report.evaluation import read_evaluation
from d2i.shards import ShardReader


def main(
    evaluations: Annotated[list[Path], typer.Argument(help="Directories made by d2i eval.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("figure5.html"),
) -> None:
    """Write one page: scores by category, and conversations of each with all images."""
    for directory in evaluations:
        card = read_evaluation(directory).card
        # Evaluations made by earlier versions have none; their features are kept.
        if has_categories(card.get("corpus")) and not (directory / CATEGORIES_NAME).exists():
            write_categories(str(directory), ShardReader(str(card["data"])))
    write_report(evaluations, out, title="People, food, animals", parts=("figure5", "cards"))
    print(out)


if __name__ == "__main__":
    try:
        typer.run(main)
    except D2IError as err:
        print(f"figure5: {err}", file=sys.stderr)
        sys.exit(2)
