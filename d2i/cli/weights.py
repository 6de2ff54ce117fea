"""Commands on weights files: list the published ones, fetch, inspect, import and export."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2i.cli.options import JsonOption, RecipeOption, SetOption
from d2i.cli.output import print_checks, print_result
from d2i.weights_catalog import PUBLISHED, PublishedFile
from d2i.weights_resolve import resolve_weights

if TYPE_CHECKING:
    from d2i.models.weights.source import Source

FileArgument = Annotated[
    str, typer.Argument(help="A published file, a model directory, or a run: a path or URL.")
]


class Layout(StrEnum):
    """Key names that a file is written with."""

    published = "published"
    diffusers = "diffusers"


def list_weights(*, as_json: JsonOption = False) -> None:
    """List the published files with source, licence and content.

    Examples:

        d2i weights list

        d2i weights list --json
    """
    files = [dataclasses.asdict(file) for file in PUBLISHED]
    lines = [line for file in PUBLISHED for line in _published_lines(file)]
    print_result({"files": files}, lines, as_json=as_json)


def fetch_weights(
    recipe: RecipeOption, settings: SetOption = None, *, as_json: JsonOption = False
) -> None:
    """Download the weights of a recipe before a job needs them.

    They go into the caches that every command reads; set HF_HOME and TORCH_HOME to directories that
    all machines share. With HF_HUB_OFFLINE=1 nothing is downloaded, only checked.

    Examples:

        d2i weights fetch --recipe demo

        d2i weights fetch --recipe uvit-s-photochat --set backbone.weights=mscoco_uvit_small.pth
    """
    from d2i.doctor.weights import fetch_weights as fetch
    from d2i.recipes import resolve_recipe

    print_checks(fetch(resolve_recipe(recipe, settings or [])), as_json=as_json)


def inspect_weights(
    file: FileArgument,
    *,
    keys: Annotated[bool, typer.Option("--keys", help="List every tensor and its shape.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Identify a weights file by its keys and shapes.

    No code in it is executed.

    Examples:

        d2i weights inspect mscoco_uvit_small.pth

        d2i weights inspect d2i-demo/run/ema.safetensors --keys
    """
    from d2i.models.weights.source import inspect_file

    result = inspect_file(_path(file))
    print_result(result, _inspected_lines(result, with_keys=keys), as_json=as_json)


def import_weights(
    file: FileArgument,
    out: Annotated[str, typer.Option(help="The model directory to write, a path or a URL.")],
    settings: SetOption = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Convert published weights to a model directory.

    The directory holds config.json, safetensors and a model card. Every key and shape is checked
    first, so nothing is imported in part. Use the directory as backbone.weights, encoders.vae or
    encoders.text_prefix.

    Examples:

        d2i weights import mscoco_uvit_small.pth --out models/uvit-s

        d2i weights import 1000000.ckpt --out models/mine --set num_heads=8

        d2i weights import autoencoder_kl.pth --out models/vae
    """
    from d2i.models.weights.convert import import_weights as import_into

    source = import_into(_path(file), out, settings or [])
    _print_source(source, out, as_json=as_json)


def export_weights(
    file: FileArgument,
    out: Annotated[
        str, typer.Option(help="The file (published) or directory (diffusers) to write.")
    ],
    to: Annotated[Layout, typer.Option(help="Key names to write.")],
    settings: SetOption = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Export weights for other programs.

    They become a flat file, or a directory for diffusers.

    Examples:

        d2i weights export d2i-demo/run --to published --out mine.pth

        d2i weights export models/unidiffuser-v1 --to diffusers --out unet
    """
    from d2i.models.weights.convert import export_weights as export_as

    source = export_as(_path(file), out, to.value, settings or [])
    _print_source(source, out, as_json=as_json)


def _path(file: str) -> Path:
    return Path(resolve_weights(file))


def _print_source(source: Source, out: str, *, as_json: bool) -> None:
    result = {
        "out": out,
        "what": source.found.words,
        "num_tensors": len(source.state),
        "sha256": source.sha256,
    }
    lines = [
        source.found.words,
        f"{len(source.state)} tensors of {source.file}",
        f"sha256 {source.sha256}",
        out,
    ]
    print_result(result, lines, as_json=as_json)


def _published_lines(file: PublishedFile) -> Iterator[str]:
    yield f"{file.name}: {file.holds}"
    yield f"  from {file.source}; licence: {file.licence}"
    yield f"  {file.num_keys} tensors, shapes {file.shapes_sha256}"


def _inspected_lines(result: dict[str, Any], *, with_keys: bool) -> Iterator[str]:
    yield f"{result['file']}: {result['size_bytes']:,} bytes"
    yield f"sha256 {result['sha256']}"
    yield result["what"] or "not a kind of weights that d2i knows"
    names = " or ".join(result["published"])
    yield f"keys and shapes match {names}" if names else "keys and shapes match no published file"
    kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(result["dtypes"].items()))
    yield f"{result['num_tensors']} tensors ({kinds}), {result['num_parameters']:,} parameters"
    yield f"shapes {result['shapes_sha256']}"
    if found := result["not_finite"]:
        num, first = sum(found.values()), next(iter(found))
        yield f"warning: {num} values are NaN or infinite, the first in {first}"
    if with_keys:
        yield from (f"  {name} {shape}" for name, shape in sorted(result["shapes"].items()))
