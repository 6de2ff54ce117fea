"""Encoding: the precision of the encoders, and values that float16 cannot hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from numpy.typing import NDArray

from d2i.config import Precision
from d2i.dialog import ImageRef, Instance, Turn
from d2i.encoders import Encoders, load_encoders
from d2i.errors import CheckpointError, ShardError
from d2i.fetch.result import FetchResult
from d2i.preprocess.workers.encode_worker import EncodeWorker, EncodeWorkerBuilder
from d2i.preprocess.workers.messages import FetchedImage, SourceImage
from d2i.preprocess.workers.spill_buffer import source_bytes
from d2i.prompt_text import context_tokens
from d2i.recipes import change_recipe, load_recipe
from d2i.tokenize import encode, window

RECIPE = load_recipe("demo")
SIDE = RECIPE.image.resolution


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    return load_encoders(RECIPE.encoders)


@pytest.fixture(scope="module")
def pixels() -> NDArray[np.uint8]:
    """A black square, a white one, and smooth ones."""
    ramp = np.linspace(0, 255, SIDE).astype(np.uint8)
    smooth = [np.stack(np.broadcast_arrays(ramp[:, None], ramp, shift), -1) for shift in (0, 200)]
    plain = [np.full((SIDE, SIDE, 3), level, np.uint8) for level in (0, 255)]
    return np.stack([*plain, *smooth]).astype(np.uint8)


def relative_rms(exact: NDArray[np.float16], other: NDArray[np.float16]) -> float:
    wide, difference = exact.astype(np.float64), other.astype(np.float64) - exact
    return float(np.sqrt(np.mean(difference**2) / np.mean(wide**2)))


@pytest.mark.parametrize(("precision", "max_error"), [("bf16", 0.05), ("fp16", 0.01)])
def test_encoder_precision_changes_features_within_rounding(
    encoders: Encoders, pixels: NDArray[np.uint8], precision: Precision, max_error: float
) -> None:
    lower = load_encoders(RECIPE.encoders, precision=precision)
    assert lower.hashes() == encoders.hashes()
    tokens = window(encode("# i saw a red ball # at night"))[None]
    exact = [*encoders.encode_images(pixels).values(), encoders.encode_text(tokens)]
    other = [*lower.encode_images(pixels).values(), lower.encode_text(tokens)]
    for one, two in zip(exact, other, strict=True):
        assert 0 < relative_rms(one, two) < max_error


def test_float32_encoders_disable_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN would use TF32; the effect of the flag shows only on a GPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert load_encoders(RECIPE.encoders).device_kind == "cpu"
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_encoder_precision_must_match_existing_data(encoders: Encoders, tmp_path: Path) -> None:
    lower = change_recipe(RECIPE, ["preprocess.encoder_precision=bf16"])
    EncodeWorker(EncodeWorkerBuilder(RECIPE, ()), encoders).lock_fingerprint(str(tmp_path))
    with pytest.raises(ShardError, match=r"image\.precision: bf16, expected fp32"):
        EncodeWorker(EncodeWorkerBuilder(lower, ()), encoders).lock_fingerprint(str(tmp_path))


def test_latent_beyond_float16_is_permanent_failure(
    pixels: NDArray[np.uint8], tmp_path: Path
) -> None:
    """One of two images in a batch fails, and the other is encoded."""
    encoders = load_encoders(RECIPE.encoders)
    moments = encoders.vae.encode(pixels[:2], encoders.compute_batch_size)
    largest = np.abs(moments).reshape(2, -1).max(1)
    good, bad = np.argsort(largest).tolist()
    # The last layer is linear: scaled by this factor, one image is beyond float16, one is not.
    factor = float(np.finfo(np.float16).max) / np.sqrt(largest.prod())
    with torch.no_grad():
        for parameter in encoders.vae.module.quant_conv.parameters():
            parameter.mul_(factor)
    instances = [instance(number) for number in range(2)]
    found = [fetched(i.image_ref, pixels[number]) for number, i in enumerate(instances)]
    worker = EncodeWorker(EncodeWorkerBuilder(RECIPE, ()), encoders)
    with source_bytes(str(tmp_path)) as sources:
        made = worker.encode(instances, found, sources)
        assert [sample.key for sample in made.samples] == [instances[good].key]
    rows = {row.key: row for row in made.rows}
    assert rows[instances[good].key].status == "ok"
    lost = rows[instances[bad].key]
    assert (lost.status, lost.reason) == ("permanent", "non_finite_latent")
    assert "float16" in lost.detail


def beyond_float16_of(encoders: Encoders, good: str, bad: str) -> str:
    """Scale the text encoder until the latents of one text are beyond float16; return that."""
    tokens = np.stack([context_tokens((Turn(0, text),), RECIPE.text) for text in (good, bad)])
    latents = encoders.clip_text.encode(tokens, encoders.compute_batch_size)
    largest = np.abs(latents).reshape(2, -1).max(1)
    factor = float(np.finfo(np.float16).max) / np.sqrt(largest.prod())
    with torch.no_grad():
        for parameter in encoders.clip_text.module.text_model.final_layer_norm.parameters():
            parameter.mul_(factor)
    return (good, bad)[int(largest.argmax())]


def test_text_beyond_float16_is_failed_ledger_row(
    pixels: NDArray[np.uint8], tmp_path: Path
) -> None:
    """One of two contexts of an image fails: it is in the ledger and not in the shard."""
    encoders = load_encoders(RECIPE.encoders)
    texts = ("a red ball on the beach", "no wait, the blue one at night")
    bad = beyond_float16_of(encoders, *texts)
    instances = [replace(instance(n), context=(Turn(0, text),)) for n, text in enumerate(texts)]
    one = instances[0].image_ref
    instances = [replace(i, image_ref=one) for i in instances]
    worker = EncodeWorker(EncodeWorkerBuilder(RECIPE, ()), encoders)
    written = [i.key for i in instances if i.context[0].text != bad]
    with source_bytes(str(tmp_path)) as sources:
        made = worker.encode(instances, [fetched(one, pixels[2])], sources)
        assert [sample.key for sample in made.samples] == written
    assert {row.key: row.reason for row in made.rows} == {
        i.key: "ok" if i.key in written else "non_finite_text" for i in instances
    }


def test_empty_text_beyond_float16_raises(tmp_path: Path) -> None:
    encoders = load_encoders(RECIPE.encoders)
    with torch.no_grad():
        encoders.clip_text.module.text_model.final_layer_norm.bias.fill_(1e6)
    with pytest.raises(CheckpointError, match="for the empty text does not fit in float16"):
        EncodeWorker(EncodeWorkerBuilder(RECIPE, ()), encoders).lock_fingerprint(str(tmp_path))
    assert not list(tmp_path.glob("empty_text.npy"))


def instance(number: int) -> Instance:
    ref = ImageRef("file", (f"{number}.png",))
    return Instance(f"train-{number}-0-0", "train", str(number), 0, 0, (Turn(0, "hi"),), ref)


def fetched(ref: ImageRef, square: NDArray[np.uint8]) -> FetchedImage:
    file = {"suffix": "png", "width": SIDE, "height": SIDE, "size_bytes": 1, "sha256": "0" * 64}
    image = SourceImage(**file, pixels=square)
    return FetchedImage(ref, FetchResult(None), image, 0.0)
