"""Commands over a run that is under way or finished: select."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from d2i.cli.console import JsonOption, ProgressLine, SetOption, print_result, register
from d2i.errors import ConfigError
from d2i.metric_specs import METRICS


def add_commands(app: typer.Typer) -> None:
    """Give the commands of this module to the app."""
    register(app, select)


def select(
    run: Annotated[str | None, typer.Option(help="A run with checkpoints.")] = None,
    system: Annotated[
        str | None, typer.Option(help="No run: a backbone's name, or diffusers:PATH.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="Of a backbone, as in d2i eval.")] = None,
    adapter: Annotated[str | None, typer.Option(help="A LoRA on a diffusers: system.")] = None,
    data: Annotated[
        str | None, typer.Option(help="A folder made by d2i preprocess; a run has its own.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="With --system: folder of best.json.")] = None,
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
    """Find what scores best on validation dialogs: best.json.

    Of a run that is a checkpoint, the weights (ema, ema-short or trained) and the guidance. Of
    other systems it is the guidance, so that no side of a comparison has its own tuned alone;
    d2i eval --selected OUT draws with it.

    Examples:

        d2i select --run runs/demo --guidance 1.5 --guidance 2 --guidance 3

        d2i select --run runs/a --metric clip_i --num-instances 200 --set sample.num_steps=20

        d2i select --system uvit-s --weights mscoco_uvit_small.pth --data data/photochat
        --out chosen/uvit-s --guidance 1.5 --guidance 2 --guidance 3
    """
    from d2i.model_selection import SelectRequest
    from d2i.model_selection import select as run_select

    if (run is None) == (system is None):
        raise ConfigError("got both or neither of --run and --system; expected one; give one")
    if run is not None and any((weights, adapter, out)):
        raise ConfigError(
            "--run has weights and a place of its own; got --weights, --adapter or --out with it; "
            "leave them out"
        )
    request = SelectRequest(
        system=system or f"run:{run}",
        weights=weights,
        adapter=adapter,
        data_url=data,
        out_url=out,
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
    lines = [f"{_words(c)}  {metric} {c['scores'][metric]:.4g}" for c in result["candidates"]]
    print_result(result, [*lines, f"best: {_words(result)} (best.json)"], as_json=as_json)


def _words(candidate: dict[str, Any]) -> str:
    of_run = (
        f"step {candidate['step']}  {candidate['weights_kind']}  " if "step" in candidate else ""
    )
    return f"{of_run}guidance {candidate['guidance_scale']:g}"
