"""Commands that make prepared data and look at it: preprocess, verify, inspect."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from d2i.cli.console import (
    CorpusOption,
    FaultOption,
    JsonOption,
    ProgressLine,
    RayOption,
    RecipeOption,
    SetOption,
    SourceOption,
    counted,
    existing_source,
    print_result,
    register,
)
from d2i.errors import ConfigError

if TYPE_CHECKING:
    from d2i.config import Recipe
    from d2i.preprocess.fetch.sources import Access
    from d2i.preprocess.job import PreprocessRequest, SplitSummary


def add_commands(app: typer.Typer) -> None:
    """Give the commands of this module to the app."""
    for command in (preprocess, verify, inspect):
        register(app, command)


def preprocess(
    corpus: CorpusOption,
    source: SourceOption,
    out: Annotated[str, typer.Option(help="Folder of the shards; the same command resumes.")],
    recipe: RecipeOption,
    split: Annotated[str | None, typer.Option(help="train, valid or test; else all.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Keep N instances a split.")] = None,
    seed: Annotated[int, typer.Option(help="Decides which N are kept.")] = 0,
    exclude: Annotated[
        str | None, typer.Option(metavar="FILE", help="Instance keys to leave out, one a line.")
    ] = None,
    settings: SetOption = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="HOST:PORT", help="A private host to be asked.")
    ] = None,
    dns_server: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Find hosts through this DNS server."),
    ] = None,
    proxy: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar="D2I_PROXY",
            help="Ask through http://[USER:PASSWORD@]HOST:PORT.",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Ray workers; 0: this process, without Ray.")
    ] = None,
    fetch_workers: Annotated[
        int | None, typer.Option(min=1, help="Ray workers that fetch and decode.")
    ] = None,
    ray_address: RayOption = None,
    *,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Ask again for what failed in passing.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan, and fetch nothing.")] = False,
    as_json: JsonOption = False,
    fault: FaultOption = None,
) -> None:
    """Prepare a corpus: conversations and pictures in, shards of latents out.

    Examples:

        d2i preprocess --corpus mmdialog --source MMDialog --out data --recipe uvit-s-mmdialog

        d2i preprocess --corpus photochat --source photochat --out data --recipe uvit-s-photochat
        --split test --limit 100

        d2i preprocess --corpus mmdialog --source MMDialog --out data --recipe uvit-s-mmdialog
        --exclude leaks.jsonl

        d2i preprocess --corpus photochat --source photochat --out data --recipe uvit-s-photochat
        --retry-failed
    """
    from d2i.fault import parse_fault
    from d2i.preprocess.job import PreprocessRequest, plan_job
    from d2i.preprocess.job import preprocess as run

    request = PreprocessRequest(
        corpus=corpus,
        source=existing_source(source),
        out=out,
        recipe=_recipe(recipe, settings),
        split=split,
        limit=limit,
        seed=seed,
        exclude=exclude,
        retry_failed=retry_failed,
        access=_access(allow_host or [], dns_server, proxy),
        num_workers=workers,
        num_fetchers=fetch_workers,
        ray_address=ray_address,
        fault=parse_fault(fault),
    )
    if dry_run:
        plans = plan_job(request, keep=False)
        lines = [
            f"{name}: {plan.num_instances} instances of {plan.num_images} pictures, "
            f"{plan.num_shards} shards, excluded: {plan.num_excluded}, "
            f"corpus problems: {counted(plan.problems)}"
            for name, plan in plans.items()
        ]
        result = {name: dataclasses.asdict(plan) for name, plan in plans.items()}
        print_result(result, lines, as_json=as_json)
        return
    summaries = _with_progress(request, run)
    print_result(
        {"splits": [dataclasses.asdict(summary) for summary in summaries], "out": out},
        [line for summary in summaries for line in _summary_lines(summary)],
        as_json=as_json,
    )


def verify(
    folder: Annotated[str, typer.Argument(help="A folder made by d2i preprocess.")],
    *,
    as_json: JsonOption = False,
) -> None:
    """Check every byte of prepared shards against their manifest; exit code 1 if any is wrong.

    Examples:

        d2i verify data

        d2i verify data/test
    """
    from d2i.shards import verify as verify_shards

    progress = ProgressLine()
    problems: list[dict[str, str]] = []
    num_samples = num_shards = 0
    for url in _data_sets(folder):
        report = verify_shards(
            url, on_progress=lambda done, total: progress.show(f"{done}/{total}")
        )
        problems += [dataclasses.asdict(p) | {"folder": url} for p in report.problems]
        num_samples, num_shards = num_samples + report.num_samples, num_shards + report.num_shards
    progress.close()
    lines = [f"{p['folder']}/{p['file']}: {p['reason']}: {p['detail']}" for p in problems]
    lines.append(f"{num_samples} samples in {num_shards} shards, {len(problems)} problems")
    print_result(
        {"num_samples": num_samples, "num_shards": num_shards, "problems": problems},
        lines,
        as_json=as_json,
    )
    if problems:
        raise typer.Exit(1)


def inspect(
    folder: Annotated[str, typer.Argument(help="A data set: one split's folder.")],
    num: Annotated[int, typer.Option(min=1, help="How many samples.")] = 3,
    *,
    as_json: JsonOption = False,
) -> None:
    """Look at samples: the conversation, where the picture came from, what is stored.

    Examples:

        d2i inspect data/test

        d2i inspect data/test --num 10 --json
    """
    from d2i.shards import ShardReader

    reader = ShardReader(_data_sets(folder)[0])
    samples = [reader.read_json(index) for index in range(min(num, len(reader)))]
    arrays = {name: [info.dtype, *info.shape] for name, info in reader.manifest.arrays.items()}
    lines = [f"{len(reader)} samples; each holds {arrays}"]
    for sample in samples:
        lines += ["", f"{sample['key']}  <-  {sample['source']['ref'][0]}"]
        lines += [f"  {turn['speaker']}: {turn['text']}" for turn in sample["context"]]
    print_result({"num_samples": len(reader), "samples": samples}, lines, as_json=as_json)


def _with_progress(request: PreprocessRequest, run: object) -> list[SplitSummary]:
    progress = ProgressLine()
    try:
        summaries: list[SplitSummary] = run(request, lambda p: progress.show(p.line()))  # type: ignore[operator]
    finally:
        progress.close()
    return summaries


def _summary_lines(summary: SplitSummary) -> list[str]:
    line = (
        f"{summary.split}: read {summary.num_instances}, written {summary.num_written} in "
        f"{summary.num_shards} shards, excluded: {summary.num_excluded}, "
        f"failed: {counted(summary.failures)}, "
        f"corpus problems: {counted(summary.problems)}"
    )
    return [line, *(f"  lost to {h.host}: {counted(h.failures)}" for h in summary.hosts)]


def _access(allow_host: list[str], dns_server: str | None, proxy: str | None) -> Access:
    from d2i.preprocess.fetch.guard import allowed_hosts
    from d2i.preprocess.fetch.proxy import parse_proxy
    from d2i.preprocess.fetch.sources import Access

    if proxy and dns_server:
        raise ConfigError(
            f"--dns-server {dns_server}: got --proxy as well, which finds the hosts itself; "
            "expected one of the two; leave one out"
        )
    return Access(allowed_hosts(allow_host), dns_server, parse_proxy(proxy) if proxy else None)


def _recipe(name: str, settings: list[str] | None) -> Recipe:
    from d2i.recipes import resolve_recipe

    return resolve_recipe(name, settings or [])


def _data_sets(folder: str) -> list[str]:
    """Return the folder itself if it is a data set, else the splits below it."""
    from d2i import storage

    candidates = [folder, *(storage.join(folder, name) for name in ("train", "valid", "test"))]
    found = [url for url in candidates if storage.exists(storage.join(url, "manifest.json"))]
    if not found:
        raise ConfigError(
            f"{folder} holds no manifest.json; expected a folder made by d2i preprocess; "
            "repeat its command to finish it, or check the path"
        )
    return found
