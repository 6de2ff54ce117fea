"""Decoding apart: the same pictures, and no picture takes the worker down with it."""

from __future__ import annotations

import io
import os
import re
import resource
import signal
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from d2i.config import ImageConfig
from d2i.image_decode import ImageRejectedError, crop_to_square, decode_image
from d2i.preprocess.decoder import Decoder
from tests.bombs import webp_bomb

LIMITS = ImageConfig(resolution=32)


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    made = Decoder(LIMITS, timeout_s=20.0, max_decode_mib=512)
    yield made
    made.close()


def saved(form: str, size: tuple[int, int] = (90, 60), **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [saved("JPEG"), saved("JPEG", progressive=True), *map(saved, ("PNG", "WEBP", "GIF"))],
    ids=["jpeg", "progressive", "png", "webp", "gif"],
)
def test_a_picture_is_the_same_wherever_it_is_decoded(decoder: Decoder, data: bytes) -> None:
    whole = decode_image(data, LIMITS)
    found = decoder.decode(data)
    assert (found.pixels == np.asarray(crop_to_square(whole.image, 32))).all()
    assert (found.width, found.height, found.suffix) == (90, 60, whole.suffix)


def test_a_picture_that_takes_too_much_memory_is_refused_and_the_next_one_read() -> None:
    small = Decoder(ImageConfig(resolution=32, max_megapixels=200), 60.0, max_decode_mib=400)
    huge = io.BytesIO()
    Image.new("RGB", (12_000, 12_000)).save(huge, "PNG")
    with pytest.raises(ImageRejectedError) as caught:
        small.decode(huge.getvalue())
    assert caught.value.reason in ("decode_memory", "decode_error")
    assert small.decode(saved("PNG")).width == 90
    small.close()


def test_a_picture_that_takes_too_long_is_refused_and_the_next_one_read() -> None:
    hasty = Decoder(LIMITS, timeout_s=30.0, max_decode_mib=512)
    assert hasty.decode(saved("PNG")).width == 90
    assert hasty._child is not None
    os.kill(hasty._child.pid, signal.SIGSTOP)
    hasty._timeout_s = 0.2
    with pytest.raises(ImageRejectedError) as caught:
        hasty.decode(saved("GIF"))
    assert caught.value.reason == "decode_timeout"
    hasty._timeout_s = 30.0
    assert hasty.decode(saved("PNG")).width == 90
    hasty.close()


def test_a_child_that_does_not_read_costs_the_deadline() -> None:
    """What is sent is longer than a pipe holds."""
    hasty = Decoder(LIMITS, timeout_s=30.0, max_decode_mib=512)
    assert hasty.decode(saved("PNG")).width == 90
    assert hasty._child is not None
    os.kill(hasty._child.pid, signal.SIGSTOP)
    hasty._timeout_s = 0.2
    data = saved("PNG", (600, 400))
    assert len(data) > 500_000
    with pytest.raises(ImageRejectedError) as caught:
        hasty.decode(data)
    assert caught.value.reason == "decode_timeout"
    hasty._timeout_s = 30.0
    assert hasty.decode(data).width == 600
    hasty.close()


def test_the_child_keeps_within_its_memory(decoder: Decoder) -> None:
    with suppress(ImageRejectedError):
        decoder.decode(webp_bomb(16_383))
    assert decoder.decode(saved("PNG", (3000, 3000))).width == 3000
    assert decoder._child is not None
    status = Path(f"/proc/{decoder._child.pid}/status").read_text()
    (peak_kib,) = (int(n) for n in re.findall(r"VmPeak:\s+(\d+) kB", status))
    assert peak_kib <= 512 * 1024


def test_a_header_that_takes_memory_is_not_opened_here(decoder: Decoder) -> None:
    """A WebP's header alone makes its decoder take the canvas twice, here two gigabytes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageRejectedError):
        decoder.decode(webp_bomb(16_383))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


def test_a_decoder_that_something_else_ended_costs_nothing(decoder: Decoder) -> None:
    assert decoder.decode(saved("PNG")).width == 90
    assert decoder._child is not None
    os.kill(decoder._child.pid, signal.SIGKILL)
    assert decoder.decode(saved("PNG")).width == 90


def test_a_picture_that_ends_every_decoder_is_refused(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each child is killed once it has begun."""
    start = decoder._start

    def start_and_kill() -> object:
        child = start()
        child.kill()
        return child

    monkeypatch.setattr(decoder, "_start", start_and_kill)
    with pytest.raises(ImageRejectedError) as caught:
        decoder.decode(saved("PNG"))
    assert caught.value.reason == "decode_error"


def test_a_jpeg_of_very_many_scans_is_decoded_apart(decoder: Decoder) -> None:
    plain = saved("JPEG")
    start = plain.index(b"\xff\xda")
    decoder.decode(plain)
    assert decoder._child is None
    with suppress(ImageRejectedError):
        decoder.decode(plain[:start] + plain[start:-2] * 9 + plain[-2:])
    assert decoder._child is not None


def part(kind: int, body: bytes) -> bytes:
    return b"\xff" + bytes([kind]) + struct.pack(">H", len(body) + 2) + body


EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"
HEADERS = {
    "many parts": part(0xFE, b"x") * 201,
    "exif in parts": part(0xE1, EXIF + bytes(60_000)) * 18,
    "a byte at a time": part(0xFE, b"x") + bytes(3000),
    "fill bytes": b"\xff" * 3000,
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=list(HEADERS))
def test_a_jpeg_of_a_long_header_is_opened_apart(decoder: Decoder, header: bytes) -> None:
    plain = saved("JPEG")
    found = decoder.decode(plain[:2] + header + plain[2:])
    assert decoder._child is not None
    assert (found.pixels == decoder.decode(plain).pixels).all()


def test_what_cameras_write_is_opened_here(decoder: Decoder) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    options = {"exif": exif, "icc_profile": profile + bytes(500_000), "comment": b"by us"}
    found = decoder.decode(saved("JPEG", **options))
    assert (found.width, found.height) == (60, 90)
    assert decoder._child is None


def test_a_jpeg_of_several_pictures_gives_the_first(decoder: Decoder) -> None:
    buffer = io.BytesIO()
    first, second = (Image.new("RGB", (64, 48), colour) for colour in ("red", "blue"))
    first.save(buffer, "MPO", save_all=True, append_images=[second])
    found = decoder.decode(buffer.getvalue())
    assert found.suffix == "jpg"
    assert found.pixels[16, 16, 0] > 200


def test_broken_bytes_keep_their_reason(decoder: Decoder) -> None:
    for data, reason in (
        (b"", "not_an_image"),
        (b"\xff\xd8\xff junk", "not_an_image"),
        (saved("PNG")[:500], "decode_error"),
        (saved("PNG", (400, 8)), "too_small"),
    ):
        with pytest.raises(ImageRejectedError) as caught:
            decoder.decode(data)
        assert caught.value.reason == reason
