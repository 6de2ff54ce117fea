"""Tables 4, 6 and 7: conversations with the pictures of all systems beside the true one.

python eval/cases.py scores/uvit-s scores/uvit-s-ours scores/minigpt5 --out cases.html

The conversations are the first by a hash of their keys among those whose pictures were all kept.
"""

from pathlib import Path
from typing import Annotated

import typer

from d2i.report import write_report


def main(
    evaluations: Annotated[list[Path], typer.Argument(help="Folders made by d2i eval.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("cases.html"),
) -> None:
    """Write one page of conversations."""
    write_report(evaluations, out, title="Cases", parts=("conversations", "cards"))
    print(out)


if __name__ == "__main__":
    typer.run(main)
