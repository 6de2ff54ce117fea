"""Tables 4, 6 and 7: conversations with the images of all systems beside the reference image.

python eval/cases.py scores/uvit-s scores/uvit-s-ours scores/minigpt5 --out cases.html

The conversations are the first by a hash of their keys among those whose images were all kept, or
those of --case KEY, as d2i report takes it.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from d2i.errors import D2IError
from d2i.report import write_report


def main(
    evaluations: Annotated[list[Path], typer.Argument(help="Directories made by d2i eval.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("cases.html"),
    case: Annotated[list[str] | None, typer.Option(help="Key of an instance; repeatable.")] = None,
) -> None:
    """Write one page of conversations."""
    parts = ("conversations", "cards")
    write_report(evaluations, out, title="Cases", parts=parts, cases=case or ())
    print(out)


if __name__ == "__main__":
    try:
        typer.run(main)
    except D2IError as err:
        print(f"cases: {err}", file=sys.stderr)
        sys.exit(2)
