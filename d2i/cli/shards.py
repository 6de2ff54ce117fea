"""Commands on prepared data: verify, repair, inspect."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2i.cli.console import (
    FaultOption,
    FetchWorkersOption,
    JsonOption,
    ProgressLine,
    RayOption,
    SetOption,
    WorkersOption,
    print_result,
    register,
)
from d2i.cli.network_policy import AllowHostOption, DnsServerOption, ProxyOption, network_policy_of

if TYPE_CHECKING:
    from d2i.shards import ShardReader


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this module to the app."""
    for command in (verify, repair, inspect):
        register(app, command)


def verify(
    directory: Annotated[str, typer.Argument(help="A directory made by d2i preprocess.")],
    *,
    as_json: JsonOption = False,
) -> None:
    """Verify every byte of shards, plan and ledger. Exits with 1 if any is damaged or missing.

    Examples:

        d2i verify data

        d2i verify data/test
    """
    from d2i.preprocess.job_files import check_job_files
    from d2i.shards import find_data_sets
    from d2i.shards import verify as verify_shards

    progress = ProgressLine()
    problems: list[dict[str, str]] = []
    num_samples = num_shards = 0
    for url in find_data_sets(directory):
        report = verify_shards(
            url, on_progress=lambda done, total: progress.show(f"{done}/{total}")
        )
        found = [*report.problems, *check_job_files(url)]
        problems += [dataclasses.asdict(p) | {"folder": url} for p in found]
        num_samples, num_shards = num_samples + report.num_samples, num_shards + report.num_shards
    progress.close()
    lines = [_problem_line(problem) for problem in problems]
    lines.append(f"{num_samples} samples in {num_shards} shards, {len(problems)} problems")
    print_result(
        {"num_samples": num_samples, "num_shards": num_shards, "problems": problems},
        lines,
        as_json=as_json,
    )
    if problems:
        raise typer.Exit(1)


def repair(
    directory: Annotated[str, typer.Argument(help="A directory made by d2i preprocess.")],
    allow_host: AllowHostOption = None,
    dns_server: DnsServerOption = None,
    proxy: ProxyOption = None,
    workers: WorkersOption = None,
    fetch_workers: FetchWorkersOption = None,
    ray_address: RayOption = None,
    settings: SetOption = None,
    *,
    as_json: JsonOption = False,
    fault: FaultOption = None,
) -> None:
    """Repair broken or missing shards byte for byte. Exits with 1 if any remain.

    Intact files restore damaged ones; only lost samples are fetched and encoded again.

    Examples:

        d2i repair data

        d2i repair data/test --workers 0
    """
    from d2i.fault_injection import parse_fault
    from d2i.preprocess.repair import RepairRequest
    from d2i.preprocess.repair import repair as run

    progress = ProgressLine()
    request = RepairRequest(
        directory=directory,
        network_policy=network_policy_of(allow_host, dns_server, proxy),
        num_workers=workers,
        num_fetchers=fetch_workers,
        ray_address=ray_address,
        fault=parse_fault(fault),
        settings=tuple(settings or ()),
    )
    try:
        summaries = run(
            request, lambda done, total: progress.show(f"{done}/{total} shards rebuilt")
        )
    finally:
        progress.close()
    lines = []
    for summary in summaries:
        url = summary.folder
        problems = [dataclasses.asdict(p) | {"folder": url} for p in summary.problems]
        lines += [_problem_line(problem) for problem in problems]
        lines += [f"{url}/{note}" for note in summary.notes]
        lines.append(
            f"{url}: {len(summary.mended)} files restored, {len(summary.made)} shards "
            f"rebuilt, {len(problems)} problems left"
        )
    result = {"data_sets": [dataclasses.asdict(summary) for summary in summaries]}
    print_result(result, lines, as_json=as_json)
    if any(summary.problems for summary in summaries):
        raise typer.Exit(1)


def inspect(
    directory: Annotated[str, typer.Argument(help="A data set: the directory of one split.")],
    num: Annotated[int, typer.Option(min=1, help="Number of samples.")] = 3,
    html: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write an HTML page with their images.")
    ] = None,
    settings: SetOption = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Show samples: the conversation, the source of the image, the stored arrays.

    Examples:

        d2i inspect data/test

        d2i inspect data/test --num 10 --json

        d2i inspect data/test --num 10 --html samples.html
    """
    from d2i.shards import ShardReader, check_metadata, find_data_sets

    reader = ShardReader(find_data_sets(directory)[0])
    samples = [reader.read_json(index) for index in range(min(num, len(reader)))]
    for key, sample in zip(reader.keys, samples, strict=False):
        check_metadata(key, sample)
    arrays = {name: [info.dtype, *info.shape] for name, info in reader.manifest.arrays.items()}
    lines = [f"{len(reader)} samples; each holds {arrays}"]
    for sample in samples:
        lines += ["", f"{sample['key']}  <-  {sample['source']['ref'][0]}"]
        turns = [turn for turn in sample["context"] if turn["text"].strip()]
        lines += [f"  {turn['speaker']}: {turn['text']}" for turn in turns]
    if html is not None:
        _write_page(html, reader, len(samples), settings or [])
        lines += ["", f"page: {html}"]
    print_result({"num_samples": len(reader), "samples": samples}, lines, as_json=as_json)


def _write_page(html: str, reader: ShardReader, num: int, settings: list[str]) -> None:
    """Decode the latents of the first samples with the autoencoder that encoded them."""
    import torch

    from d2i.dialog import Turn
    from d2i.encoders import Vae, check_encoder_hashes
    from d2i.images.decode import png_bytes
    from d2i.prompt_text import context_text
    from d2i.recipes import change_recipe, read_stored_recipe
    from d2i.report import ShownSample, write_samples_page

    recipe = change_recipe(read_stored_recipe(reader.url), settings)
    vae = Vae(recipe.encoders.vae, recipe.encoders.vae_kind)
    check_encoder_hashes({"vae": vae.hash}, reader.manifest, reader.url)
    batch = reader.read(range(num), ["moments", "tokens"])
    shown = []
    for place in range(num):
        mean = torch.from_numpy(batch["moments"][place : place + 1, :4])
        (pixels,) = vae.decode(mean, batch_size=1)
        metadata = reader.read_json(place)
        shown.append(
            ShownSample(
                metadata=metadata,
                line=context_text([Turn(**turn) for turn in metadata["context"]], recipe.text),
                tokens=batch["tokens"][place].tolist(),
                kept=reader.read_image(place),
                decoded=png_bytes(pixels),
            )
        )
    write_samples_page(html, reader.url, len(reader), shown)


def _problem_line(problem: dict[str, Any]) -> str:
    return f"{problem['folder']}/{problem['file']}: {problem['reason']}: {problem['detail']}"
