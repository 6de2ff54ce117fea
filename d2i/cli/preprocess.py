"""The preprocess command."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2i.cli.help import FETCHING, FORECAST, INSTANCES
from d2i.cli.options import (
    AllowHostOption,
    CorpusOption,
    DnsServerOption,
    FaultOption,
    FetchWorkersOption,
    JsonOption,
    PriceOption,
    ProxyOption,
    RateOption,
    RayOption,
    RecipeOption,
    SetOption,
    SourceOption,
    WorkersOption,
    assumed_of,
    existing_source,
    network_policy_of,
)
from d2i.cli.output import counted, forecast_lines, print_result
from d2i.cli.session import open_session

if TYPE_CHECKING:
    from d2i.cluster import Session
    from d2i.cluster.estimate import RateOverrides
    from d2i.config import Recipe
    from d2i.preprocess.job import PreprocessRequest
    from d2i.preprocess.plan.planner import Plan
    from d2i.preprocess.split_summary import SplitSummary


def preprocess(
    corpus: CorpusOption,
    source: SourceOption,
    out: Annotated[str, typer.Option(help="Directory of the shards; the same command resumes.")],
    recipe: RecipeOption,
    split: Annotated[
        str | None,
        typer.Option(
            help="train, valid or test; else all. 0.8,0.1,0.1 splits one unsplit file.",
            rich_help_panel=INSTANCES,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, help="Keep at most so many instances per split.", rich_help_panel=INSTANCES
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            help="Seed of the choice of --limit, and of --split 0.8,0.1,0.1.",
            rich_help_panel=INSTANCES,
        ),
    ] = 0,
    exclude: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Instance keys to leave out, one per line.",
            rich_help_panel=INSTANCES,
        ),
    ] = None,
    reuse: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Prepared data to take images from."),
    ] = None,
    settings: SetOption = None,
    allow_host: AllowHostOption = None,
    dns_server: DnsServerOption = None,
    proxy: ProxyOption = None,
    workers: WorkersOption = None,
    fetch_workers: FetchWorkersOption = None,
    ray_address: RayOption = None,
    *,
    retry_failed: Annotated[
        bool,
        typer.Option(
            "--retry-failed",
            help="Retry images that failed with a transient error.",
            rich_help_panel=FETCHING,
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Plan and estimate time, cost and memory; fetch nothing.",
            rich_help_panel=FORECAST,
        ),
    ] = False,
    rate: RateOption = None,
    price_per_node_hour: PriceOption = None,
    as_json: JsonOption = False,
    fault: FaultOption = None,
) -> None:
    """Turn conversations and images into shards of latents.

    Every instance ends as a sample or as a row of the ledger with a reason.

    Examples:

        d2i preprocess --corpus mmdialog --source d2i-demo/corpus --out data --recipe demo

        d2i preprocess --corpus mmdialog --source d2i-demo/corpus --out data --recipe demo
        --retry-failed

        d2i preprocess --corpus mmdialog --source d2i-demo/corpus --out data --recipe demo
        --dry-run --price-per-node-hour 4

        d2i preprocess --corpus mmdialog --source d2i-demo/corpus --out spaced --recipe demo
        --set text.strategy=space --reuse d2i-demo/data

        d2i preprocess --corpus photochat --source photochat --out data --recipe uvit-s-photochat
        --split test --limit 100

        d2i preprocess --corpus mmdialog --source MMDialog --out data --recipe uvit-s-mmdialog
        --exclude leaks.jsonl

        d2i preprocess --corpus jsonl --source chats/all.jsonl --out data --recipe uvit-s-mmdialog
        --split 0.8,0.1,0.1

        d2i preprocess --corpus mmdialog --source MMDialog --out data --recipe uvit-s-mmdialog
        --ray-address auto
    """
    from d2i.preprocess.job import PreprocessRequest, make_splits
    from d2i.preprocess.split_summary import refuse_empty

    chosen = _recipe(recipe, settings)
    if split is not None and "," in split:
        divided = chosen.corpus.divided(split, seed)
        chosen, split = chosen.model_copy(update={"corpus": divided}), None
    assumed = assumed_of(rate, price_per_node_hour, dry_run=dry_run)
    request = PreprocessRequest(
        corpus=corpus,
        source=existing_source(source),
        out=out,
        recipe=chosen,
        split=split,
        limit=limit,
        seed=seed,
        exclude=exclude,
        reuse=reuse,
    )
    network_policy = network_policy_of(allow_host, dns_server, proxy)
    with open_session(workers, ray_address, fault, num_producers=fetch_workers) as (
        session,
        progress,
    ):
        if dry_run:
            result, lines = _foresee(request, session, assumed)
            progress.close()
            print_result(result, lines, as_json=as_json)
            return
        summaries = make_splits(
            request,
            session,
            lambda p: progress.show(p.counts()),
            network_policy=network_policy,
            retry_failed=retry_failed,
        )
    print_result(
        {"splits": [dataclasses.asdict(summary) for summary in summaries], "out": out},
        [line for summary in summaries for line in _summary_lines(summary)],
        as_json=as_json,
    )
    refuse_empty(summaries)


def _foresee(
    request: PreprocessRequest, session: Session, assumed: RateOverrides
) -> tuple[dict[str, Any], list[str]]:
    """Return the plan and the forecast, for `--json` and as lines."""
    from d2i.cluster.estimate import find_rate, forecast
    from d2i.preprocess.job import plan_job, rate_decided_by, work_left

    plans = plan_job(request, keep=False)
    offer = session.capacity()
    measured = find_rate(rate_decided_by(request, offer.unit))
    found = forecast(work_left(request, plans), offer, measured, assumed)
    lines = [
        f"{name}: {plan.num_instances} instances of {plan.num_images} images, "
        f"{plan.num_shards} shards, {_excluded(plan)}, "
        f"record issues: {counted(plan.problems)}"
        for name, plan in plans.items()
    ]
    result = {name: dataclasses.asdict(plan) for name, plan in plans.items()}
    result["forecast"] = dataclasses.asdict(found)
    return result, [*lines, *forecast_lines(found)]


def _summary_lines(summary: SplitSummary) -> list[str]:
    line = (
        f"{summary.split}: read {summary.num_instances}, written {summary.num_written} in "
        f"{summary.num_shards} shards, {_excluded(summary)}, "
        f"failed: {counted(summary.failures)}, "
        f"record issues: {counted(summary.problems)}"
    )
    return [line, *(f"  failed at {h.host}: {counted(h.failures)}" for h in summary.hosts)]


def _excluded(counts: Plan | SplitSummary) -> str:
    """Describe how many instances `--exclude` left out, and how many of its keys match none."""
    unmatched = counts.num_unmatched
    rest = f" ({unmatched} listed keys match no instance that was read)" if unmatched else ""
    return f"excluded: {counts.num_excluded}{rest}"


def _recipe(name: str, settings: list[str] | None) -> Recipe:
    from d2i.recipes import resolve_recipe

    return resolve_recipe(name, settings or [])
