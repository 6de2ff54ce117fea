"""The inspect command: samples of prepared data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from d2i.cli.options import (
    JsonOption,
    SetOption,
)
from d2i.cli.output import print_result

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

    Examples:

        d2i inspect d2i-demo/data/test

        d2i inspect d2i-demo/data/test --num 10 --json

        d2i inspect d2i-demo/data/test --num 10 --html samples.html
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
