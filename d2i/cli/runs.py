"""Commands over a run that is under way or finished: select."""

from __future__ import annotations

from typing import Annotated

import typer

from d2i.cli.console import JsonOption, ProgressLine, SetOption, print_result, register
from d2i.metric_specs import METRICS


def add_commands(app: typer.Typer) -> None:
    """Give the commands of this module to the app."""
    register(app, select)


def select(
    run: Annotated[str, typer.Option(help="A run with checkpoints.")],
    guidance: Annotated[
        list[float] | None, typer.Option(min=1, help="A guidance scale to try; may be repeated.")
    ] = None,
    metric: Annotated[
        str, typer.Option(help="The score that decides.", metavar="|".join(METRICS))
    ] = "fid",
    num_instances: Annotated[int, typer.Option(min=2, help="Validation dialogs to draw.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Chooses the dialogs.")] = 0,
    settings: SetOption = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Ray workers; else none.")] = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Find the checkpoint and the guidance that score best on validation dialogs: best.json.

    Examples:

        d2i select --run runs/demo --guidance 1.5 --guidance 2 --guidance 3

        d2i select --run runs/a --metric clip_i --num-instances 200 --set sample.num_steps=20
    """
    from d2i.select import SelectRequest
    from d2i.select import select as run_select

    request = SelectRequest(
        run_url=run,
        guidance_scales=tuple(guidance or ()),
        metric=metric,
        num_instances=num_instances,
        seed=seed,
        settings=tuple(settings or ()),
        num_workers=workers or 0,
    )
    line = ProgressLine()
    try:
        result = run_select(request, lambda name, progress: line.show(f"{name}: {progress.line()}"))
    finally:
        line.close()
    lines = [
        f"step {c['step']}  guidance {c['guidance_scale']:g}  {metric} {c['scores'][metric]:.4g}"
        for c in result["candidates"]
    ]
    best = f"best: step {result['step']}, guidance {result['guidance_scale']:g} (best.json)"
    print_result(result, [*lines, best], as_json=as_json)
