"""The eval command."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from d2i.cli.completion import complete_system
from d2i.cli.help import FORECAST, WORKERS
from d2i.cli.options import (
    CacheDirOption,
    CacheGbOption,
    CheckDataOption,
    FaultOption,
    JsonOption,
    PriceOption,
    RateOption,
    RayOption,
    SetOption,
    assumed_of,
)
from d2i.cli.output import forecast_lines, print_result
from d2i.cli.session import open_session
from d2i.errors import ConfigError

if TYPE_CHECKING:
    from d2i.cluster import Session
    from d2i.cluster.estimate import RateOverrides
    from d2i.eval.request import EvalRequest


def evaluate(
    system: Annotated[
        str, typer.Option(help="The system to evaluate: see above.", autocompletion=complete_system)
    ],
    data: Annotated[str, typer.Option(help="Directory made by d2i preprocess.")],
    out: Annotated[str, typer.Option(help="Directory of the scores; the same command resumes.")],
    weights: Annotated[
        str | None, typer.Option(help="A published file or model directory.")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="A LoRA (safetensors) for a diffusers: system.")
    ] = None,
    context: Annotated[
        Literal["full", "last", "none", "shuffled"],
        typer.Option(
            help="What the system sees: the dialog, its last turn, nothing, or another dialog."
        ),
    ] = "full",
    selected: Annotated[
        str | None, typer.Option(help="Directory of d2i select --system: use its choice.")
    ] = None,
    label: Annotated[str | None, typer.Option(help="Name of the system in tables.")] = None,
    settings: SetOption = None,
    save_images: Annotated[
        Literal["all", "sample", "none"], typer.Option(help="Images to keep, as PNG.")
    ] = "sample",
    negatives: Annotated[
        str | None,
        typer.Option(help="The corpus's directory: use the negatives that it lists for recall."),
    ] = None,
    task_size: Annotated[
        int | None,
        typer.Option(min=1, help="Instances per task of a worker.", rich_help_panel=WORKERS),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of Ray workers, with --parallel.", rich_help_panel=WORKERS
        ),
    ] = None,
    ray_address: RayOption = None,
    cache_dir: CacheDirOption = None,
    cache_gb: CacheGbOption = None,
    *,
    check_data: CheckDataOption = True,
    parallel: Annotated[
        bool, typer.Option("--parallel", help="Run on Ray.", rich_help_panel=WORKERS)
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Estimate time and cost only.", rich_help_panel=FORECAST),
    ] = False,
    rate: RateOption = None,
    price_per_node_hour: PriceOption = None,
    as_json: JsonOption = False,
    fault: FaultOption = None,
) -> None:
    """Generate an image for every test conversation, and score them.

    The scores are FID, KID, IS, CLIP-I, CLIP-T, FID on CLIP features, and recall of the reference
    image, with 95 % intervals over dialogs. KID is also given without its bias for images of the
    same dialogs.

    A system is run:DIR (with the choice of d2i select, else its last EMA, or the weights given by
    --set sample.weights=trained); a backbone's name with --weights; diffusers:PATH; unclip:PATH
    (Karlo); images:DIR (files named by instance key); retrieve:DIR (the nearest training image);
    divter:DIR,SYSTEM (a caption generator, and the system that generates images from its captions);
    or package.module:function.

    diffusers: and unclip: truncate a dialog to what the pipeline's own text encoders accept, keep
    the side that text.keep names, and generate in sample.precision; sample.pipeline sets other
    arguments of the pipeline's call.

    Examples:

        d2i eval --system run:d2i-demo/run --data d2i-demo/data --out scores/after --parallel

        d2i eval --system uvit-s --weights demo:backbone --data d2i-demo/data --out scores/before

        d2i eval --system run:d2i-demo/run --data d2i-demo/data --out scores/none --context none

        d2i eval --system diffusers:sdxl --adapter lora --data data --out scores/sdxl

        d2i eval --system images:minigpt5 --label MiniGPT-5 --data data --out scores/minigpt5
    """
    from d2i.eval.generation_settings import choose_settings
    from d2i.eval.job import evaluate as run
    from d2i.eval.request import EvalRequest
    from d2i.eval.systems import parse_system
    from d2i.recipes import change_recipe, read_stored_recipe
    from d2i.shards import ShardReader, data_set_url

    assumed = assumed_of(rate, price_per_node_hour, dry_run=dry_run)
    if workers is not None and not parallel:
        raise ConfigError("--workers applies only to Ray; expected --parallel with it; add it")
    prepared = read_stored_recipe(data)
    choice = choose_settings(system, settings or [], selected, weights=weights, adapter=adapter)
    recipe = change_recipe(prepared, choice.settings)
    spec = parse_system(system, weights, recipe, adapter)
    request = EvalRequest(
        recipe=recipe,
        system=dataclasses.replace(spec, label=label or spec.label),
        data_url=data_set_url(data, "test"),
        out_url=out,
        context=context,
        save_images=save_images,
        guidance_chosen_by=choice.guidance_by,
    )
    open_shards = partial(
        ShardReader, cache_dir=cache_dir, cache_gb=cache_gb, check_data=check_data
    )
    with open_session(workers if parallel else 0, ray_address, fault) as (session, progress):
        if dry_run:
            foreseen, lines = _foresee(request, session, task_size, assumed)
            progress.close()
            print_result(foreseen, lines, as_json=as_json)
            return
        result = run(
            request,
            session,
            lambda p: progress.show(p.counts()),
            negatives=negatives,
            task_size=task_size,
            open_shards=open_shards,
        )
    print_result(result, _score_lines(result), as_json=as_json)


def _foresee(
    request: EvalRequest,
    session: Session,
    task_size: int | None,
    assumed: RateOverrides,
) -> tuple[dict[str, Any], list[str]]:
    """Return the forecast, for `--json` and as lines."""
    from d2i.cluster.estimate import find_rate, forecast
    from d2i.eval.job import rate_decided_by, work_left
    from d2i.shards import read_manifest

    num_images = read_manifest(request.data_url).num_samples
    offer = session.capacity()
    measured = find_rate(rate_decided_by(request, offer.unit))
    found = forecast(work_left(request, num_images, task_size), offer, measured, assumed)
    result = {"pictures": num_images, "forecast": dataclasses.asdict(found)}
    lines = [f"images: {num_images}", *forecast_lines(found)]
    return result, lines


def _score_lines(result: dict[str, Any]) -> list[str]:
    card = result["card"]
    return [
        f"{card['label']}:",
        *(
            f"  {name} {value:.4g}{_interval(result['intervals'].get(name))}"
            for name, value in result["scores"].items()
            if value is not None
        ),
        *(f"warning: {warning}" for warning in result["warnings"]),
        f"scored on {card['found']} of {card['expected']} instances",
    ]


def _interval(interval: list[float] | None) -> str:
    return "" if interval is None else f"  (95 %: {interval[0]:.4g} to {interval[1]:.4g})"
