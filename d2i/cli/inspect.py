"""The inspect command: samples of prepared data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from d2i.cli.options import (
    JsonOption,
    SetOption,
)
from d2i.cli.output import print_result
from d2i.errors import ConfigError

if TYPE_CHECKING:
    from d2i.shards import ShardReader


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
    """Show some samples of prepared data.

    Each is shown with its conversation, the source of its image and the stored arrays.

    Of tars that d2i index has indexed: the key of each sample, and its members.

    Examples:

        d2i inspect d2i-demo/data/test

        d2i inspect d2i-demo/data/test --num 10 --json

        d2i inspect d2i-demo/data/test --num 10 --html samples.html
    """
    from d2i.shards import ShardReader, check_metadata, find_data_sets, is_indexed

    reader = ShardReader(find_data_sets(directory)[0])
    if is_indexed(reader.url):
        _show_members(reader, num, html, as_json=as_json)
        return
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


def _show_members(reader: ShardReader, num: int, html: str | None, *, as_json: bool) -> None:
    """Print the keys and members of the first samples of tars that d2i did not write."""
    if html is not None:
        raise ConfigError(
            f"{reader.url} holds tars that d2i did not write; expected prepared data for a page; "
            "leave out --html"
        )
    arrays = {name: [info.dtype, *info.shape] for name, info in reader.arrays.items()}
    lines, samples = [f"{len(reader)} samples; arrays that all of them hold: {arrays}"], []
    for index in range(min(num, len(reader))):
        sizes = {suffix: len(data) for suffix, data in reader.read_members(index).items()}
        samples.append({"key": reader.keys[index], "members": sizes})
        members = (f"{suffix} ({size} bytes)" for suffix, size in sizes.items())
        lines.append(f"{reader.keys[index]}: {', '.join(members)}")
    print_result({"num_samples": len(reader), "samples": samples}, lines, as_json=as_json)


def _write_page(html: str, reader: ShardReader, num: int, settings: list[str]) -> None:
    """Decode the latents of the first samples with the autoencoder that encoded them."""
    import torch

    from d2i.dialog import Turn
    from d2i.encoders import Vae
    from d2i.encoders.data_fingerprint import check_encoder_hashes
    from d2i.images.decode import png_bytes
    from d2i.prompt_text import context_text, text_tokens
    from d2i.recipes import change_recipe, read_stored_recipe
    from d2i.report import ShownSample, write_samples_page

    recipe = change_recipe(read_stored_recipe(reader.url), settings)
    vae = Vae(recipe.encoders.vae, recipe.encoders.vae_kind)
    check_encoder_hashes({"vae": vae.hash}, reader.manifest, reader.url)
    codec = vae.codec
    batch = reader.read(range(num), reader.manifest.arrays.keys() & {codec.array, "tokens"})
    shown = []
    for place in range(num):
        stored = torch.from_numpy(batch[codec.array][place : place + 1])
        (pixels,) = vae.decode(codec.mean(stored), batch_size=1)
        metadata = reader.read_json(place)
        line = context_text([Turn(**turn) for turn in metadata["context"]], recipe.text)
        tokens = batch["tokens"][place] if "tokens" in batch else text_tokens(line, recipe.text)
        shown.append(
            ShownSample(
                metadata=metadata,
                line=line,
                tokens=tokens.tolist(),
                kept=reader.read_image(place),
                decoded=png_bytes(pixels),
            )
        )
    write_samples_page(html, reader.url, len(reader), shown)
