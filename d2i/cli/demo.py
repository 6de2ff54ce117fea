"""The demo command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2i.cli.options import (
    JsonOption,
)
from d2i.cli.output import print_result


def demo(
    out: Annotated[Path, typer.Option(help="Output directory; the same command resumes.")] = (
        Path("d2i-demo")
    ),
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the corpus, training and sampling.")
    ] = 1,
    num_dialogs: Annotated[
        int, typer.Option(min=50, help="Dialogs in the synthetic corpus.")
    ] = 2000,
    num_steps: Annotated[int | None, typer.Option(min=1, help="Training steps.")] = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Run every stage at a small scale, and write a report.

    It is the paper's experiment on a synthetic corpus: prepare, evaluate, train, evaluate again.

    Examples:

        d2i demo

        d2i demo --out other-demo --seed 2 --json
    """
    from d2i.demo.run import DemoRequest, run_demo
    from d2i.io import storage

    result = run_demo(DemoRequest(Path(storage.resolve(str(out))), seed, num_dialogs, num_steps))
    lines = [
        f"attribute accuracy: {result['attribute_accuracy_before']:.1%} before, "
        f"{result['attribute_accuracy_after']:.1%} after fine-tuning "
        f"(reference images {result['attribute_accuracy_true']:.1%}, "
        f"chance {result['attribute_accuracy_chance']:.1%})",
        f"report: {result['report']}",
    ]
    print_result(result, lines, as_json=as_json)
