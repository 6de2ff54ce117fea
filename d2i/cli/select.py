"""The select command: model selection on validation dialogs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2i.cli.completion import complete_metric, complete_selected_system
from d2i.cli.options import JsonOption, SetOption
from d2i.cli.output import print_result
from d2i.cli.session import open_session
from d2i.errors import ConfigError
from d2i.io.progress_bar import Counts
from d2i.metric_specs import METRICS

if TYPE_CHECKING:
    from d2i.eval.job import EvalProgress


def select(
    run: Annotated[str | None, typer.Option(help="A run with checkpoints.")] = None,
    system: Annotated[
        str | None,
        typer.Option(
            help="Instead of --run: a backbone's name, or diffusers:PATH.",
            autocompletion=complete_selected_system,
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Weights of a backbone, as in d2i eval.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="A LoRA for a diffusers: system.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Directory made by d2i preprocess; a run has its own.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="With --system: directory of best.json.")] = None,
    guidance: Annotated[
        list[float] | None, typer.Option(min=1, help="A guidance scale to try; may be repeated.")
    ] = None,
    metric: Annotated[
        str,
        typer.Option(
            help=f"The score that decides: {', '.join(METRICS)}.", autocompletion=complete_metric
        ),
    ] = "fid",
    num_instances: Annotated[int, typer.Option(min=2, help="Number of validation dialogs.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of dialogs.")] = 0,
    settings: SetOption = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Number of Ray workers; else without Ray.")
    ] = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Select the checkpoint and guidance scale that score best.

    The scores are those of validation dialogs, and the choice is written to best.json. For a run,
    it is the checkpoint, the kind of weights (ema, ema-short or trained) and the guidance scale.
    For any other system, it is the guidance scale, so that no side of a comparison is tuned alone;
    d2i eval --selected OUT generates with it.

    Examples:

        d2i select --run d2i-demo/run --guidance 1.5 --guidance 2 --guidance 3

        d2i select --run d2i-demo/run --metric clip_i --num-instances 50 --set sample.num_steps=20

        d2i select --system uvit-s --weights mscoco_uvit_small.pth --data data/photochat
        --out chosen/uvit-s --guidance 1.5 --guidance 2 --guidance 3
    """
    from d2i.model_selection import SelectRequest
    from d2i.model_selection import select as run_select

    if (run is None) == (system is None):
        raise ConfigError("got both or neither of --run and --system; expected one; give one")
    if run is not None and any((weights, adapter, out)):
        raise ConfigError(
            "--run: got --weights, --adapter or --out as well; expected none of them, as a run has "
            "its own weights and directory; leave them out"
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
    )
    with open_session(workers or 0) as (session, progress):
        result = run_select(
            request, session, lambda name, found: progress.show(_counts_of(name, found))
        )
    lines = [f"{_words(c)}  {metric} {c['scores'][metric]:.4g}" for c in result["candidates"]]
    print_result(result, [*lines, f"best: {_words(result)} (best.json)"], as_json=as_json)


def _counts_of(candidate: str, progress: EvalProgress) -> Counts:
    counts = progress.counts()
    return dataclasses.replace(counts, line=f"{candidate}: {counts.line}", note=candidate)


def _words(candidate: dict[str, Any]) -> str:
    of_run = (
        f"step {candidate['step']}  {candidate['weights_kind']}  " if "step" in candidate else ""
    )
    return f"{of_run}guidance {candidate['guidance_scale']:g}"
