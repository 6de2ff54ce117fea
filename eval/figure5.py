"""Figure 5: people, food and animals, 50 conversations each, out of finished evaluations.

python eval/figure5.py scores/before scores/after --out figure5.html

The evaluations are of PhotoChat, whose labels say what a picture shows, and with --save-images all.
"""

from pathlib import Path
from typing import Annotated

import typer

from d2i.report import write_report


def main(
    evaluations: Annotated[list[Path], typer.Argument(help="Folders made by d2i eval.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("figure5.html"),
) -> None:
    """Write one page: CLIP-I by category, and conversations of each with all pictures."""
    write_report(evaluations, out, title="People, food, animals", parts=("figure5", "cards"))
    print(out)


if __name__ == "__main__":
    typer.run(main)
