"""The inspect command: samples of prepared data."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict, dataclass
from random import Random
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2i.cli.options import (
    JsonOption,
    SetOption,
)
from d2i.cli.output import print_result
from d2i.errors import ConfigError, D2IError, DataError, missing_extra

if TYPE_CHECKING:
    from d2i.config import Recipe
    from d2i.encoders import Vae
    from d2i.shards import ShardReader

_SEED = 0
_NUM_MEASURED = 8


@dataclass(frozen=True)
class _CodecFigures:
    """The figures of the image codec on some images of a split; none, and why, if not measured."""

    line: str
    warning: str | None
    num_images: int = 0
    psnr_db: float | None = None
    mae: float | None = None
    grid: bytes | None = None

    def lines(self) -> list[str]:
        return [self.line, f"warning: {self.warning}"] if self.warning else [self.line]

    def values(self) -> dict[str, Any]:
        """Return the figures and the warning, or why there are none, for `--json`."""
        values = asdict(self) | {"warning": self.warning if self.num_images else self.line}
        return {name: values[name] for name in ("num_images", "psnr_db", "mae", "warning")}


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

    Each is shown with its conversation, the source of its image and the stored arrays. Below is
    how well the image codec reconstructs the images of the split: PSNR and mean absolute error on
    eight of those that the shards keep, with a warning if it loses them.

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
    if html is None:
        codec = _measure_if_here(reader, settings or [])
    else:
        codec = _write_page(html, reader, len(samples), settings or [])
    lines += ["", *codec.lines()]
    lines += [] if html is None else ["", f"page: {html}"]
    result = {"num_samples": len(reader), "samples": samples, "reconstruction": codec.values()}
    print_result(result, lines, as_json=as_json)


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


def _measure_if_here(reader: ShardReader, settings: list[str]) -> _CodecFigures:
    """Measure the image codec if nothing must be downloaded or installed for it."""
    try:
        kept = _kept_images(reader)
        from d2i.encoders.available import is_loadable_offline
        from d2i.recipes import change_recipe, read_stored_recipe

        recipe = change_recipe(read_stored_recipe(reader.url), settings)
        name = recipe.encoders.vae
        if not is_loadable_offline(name):
            raise DataError(
                f"encoders.vae {name} is not on this machine; give --html to download it, or a "
                "local one with --set encoders.vae=PATH"
            )
        return _measure(kept, reader, recipe, _load_vae(reader, recipe))
    except (D2IError, OSError) as err:
        return _not_measured(str(err))
    except ModuleNotFoundError as err:
        if (reason := missing_extra(err)) is None:
            raise
        return _not_measured(reason)


def _not_measured(reason: str) -> _CodecFigures:
    return _CodecFigures(f"image codec not measured: {reason}", None)


def _kept_images(reader: ShardReader) -> dict[int, bytes]:
    """Return the source bytes of a seeded sample of images, by the place of the sample.

    Raises:
        DataError: If the shards keep none of them.
    """
    places = sorted(Random(_SEED).sample(range(len(reader)), min(_NUM_MEASURED, len(reader))))
    kept = {place: reader.read_image(place) for place in places}
    found = {place: data for place, data in kept.items() if data is not None}
    if not found:
        raise DataError(
            "these shards keep no source images; inspect the test split, or prepare with --set "
            "preprocess.keep_images=always"
        )
    return found


def _load_vae(reader: ShardReader, recipe: Recipe) -> Vae:
    """Load the autoencoder that encoded a data set."""
    from d2i.encoders import Vae
    from d2i.encoders.data_fingerprint import check_encoder_hashes

    vae = Vae(recipe.encoders.vae, recipe.encoders.vae_kind)
    check_encoder_hashes({"vae": vae.hash}, reader.manifest, reader.url)
    return vae


def _measure(
    kept: dict[int, bytes], reader: ShardReader, recipe: Recipe, vae: Vae
) -> _CodecFigures:
    """Compare images, cropped as they were for encoding, with their decoded latents."""
    import numpy as np

    from d2i.encoders.reconstruction import compare, reconstruct
    from d2i.images.decode import png_bytes
    from d2i.images.sandbox import Decoder

    fetch = recipe.fetch
    with closing(Decoder(recipe.image, fetch.decode_timeout_s, fetch.max_decode_mib)) as decoder:
        images = np.stack([decoder.decode(data).pixels for data in kept.values()])
    decoded = reconstruct(vae, reader.read(list(kept), {vae.codec.array})[vae.codec.array])
    found = compare(images, decoded)
    line = (
        f"image codec {vae.codec.name} ({recipe.encoders.vae}): PSNR {found.psnr_db:.1f} dB, "
        f"mean absolute error {found.mae:.1f} of 255, on {found.num_images} images"
    )
    rows = [np.concatenate(list(row), axis=1) for row in (images, decoded)]
    return _CodecFigures(
        line=line,
        warning=found.warning(recipe.encoders.vae),
        grid=png_bytes(np.concatenate(rows)),
        **asdict(found),
    )


def _write_page(html: str, reader: ShardReader, num: int, settings: list[str]) -> _CodecFigures:
    """Decode the latents of the first samples with the autoencoder that encoded them."""
    import torch

    from d2i.dialog import Turn
    from d2i.images.decode import png_bytes
    from d2i.prompt_text import context_text, text_tokens
    from d2i.recipes import change_recipe, read_stored_recipe
    from d2i.report import ShownCodec, ShownSample, write_samples_page

    recipe = change_recipe(read_stored_recipe(reader.url), settings)
    vae = _load_vae(reader, recipe)
    try:
        figures = _measure(_kept_images(reader), reader, recipe, vae)
    except DataError as err:
        figures = _not_measured(str(err))
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
    shown_codec = ShownCodec(figures.line, figures.warning, figures.grid)
    write_samples_page(html, reader.url, len(reader), shown, shown_codec)
    return figures
