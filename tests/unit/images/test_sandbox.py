"""Decoding in a child process gives the same images, and no image can crash the worker."""

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
from d2i.images.decode import ImageRejectedError, crop_to_square, decode_image
from d2i.images.sandbox import Decoder
from tests.bombs import webp_bomb

LIMITS = ImageConfig(resolution=32)


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    created = Decoder(LIMITS, timeout_s=20.0, max_decode_mib=512)
    yield created
    created.close()


def encoded(form: str, size: tuple[int, int] = (90, 60), **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [encoded("JPEG"), encoded("JPEG", progressive=True), *map(encoded, ("PNG", "WEBP", "GIF"))],
    ids=["jpeg", "progressive", "png", "webp", "gif"],
)
def test_decoder_matches_decode_image(decoder: Decoder, data: bytes) -> None:
    whole = decode_image(data, LIMITS)
    found = decoder.decode(data)
    assert (found.pixels == np.asarray(crop_to_square(whole.image, 32))).all()
    assert (found.width, found.height, found.suffix) == (90, 60, whole.suffix)


def test_image_over_memory_limit_is_rejected_and_next_is_read() -> None:
    small = Decoder(ImageConfig(resolution=32, max_megapixels=200), 60.0, max_decode_mib=400)
    huge = io.BytesIO()
    Image.new("RGB", (12_000, 12_000)).save(huge, "PNG")
    with pytest.raises(ImageRejectedError) as caught:
        small.decode(huge.getvalue())
    assert caught.value.reason in ("decode_memory", "decode_error")
    assert small.decode(encoded("PNG")).width == 90
    small.close()


def test_image_over_timeout_is_rejected_and_next_is_read() -> None:
    impatient = Decoder(LIMITS, timeout_s=30.0, max_decode_mib=512)
    assert impatient.decode(encoded("PNG")).width == 90
    assert impatient._child is not None
    os.kill(impatient._child.pid, signal.SIGSTOP)
    impatient._timeout_s = 0.2
    with pytest.raises(ImageRejectedError) as caught:
        impatient.decode(encoded("GIF"))
    assert caught.value.reason == "decode_timeout"
    impatient._timeout_s = 30.0
    assert impatient.decode(encoded("PNG")).width == 90
    impatient.close()


def test_deadline_kills_child_that_does_not_read() -> None:
    """The data that is sent exceeds a pipe's buffer."""
    impatient = Decoder(LIMITS, timeout_s=30.0, max_decode_mib=512)
    assert impatient.decode(encoded("PNG")).width == 90
    assert impatient._child is not None
    os.kill(impatient._child.pid, signal.SIGSTOP)
    impatient._timeout_s = 0.2
    data = encoded("PNG", (600, 400))
    assert len(data) > 500_000
    with pytest.raises(ImageRejectedError) as caught:
        impatient.decode(data)
    assert caught.value.reason == "decode_timeout"
    impatient._timeout_s = 30.0
    assert impatient.decode(data).width == 600
    impatient.close()


def test_child_stays_within_memory_limit(decoder: Decoder) -> None:
    with suppress(ImageRejectedError):
        decoder.decode(webp_bomb(16_383))
    assert decoder.decode(encoded("PNG", (3000, 3000))).width == 3000
    assert decoder._child is not None
    status = Path(f"/proc/{decoder._child.pid}/status").read_text()
    (peak_kib,) = (int(n) for n in re.findall(r"VmPeak:\s+(\d+) kB", status))
    assert peak_kib <= 512 * 1024


def test_memory_hungry_header_is_not_opened_in_process(decoder: Decoder) -> None:
    """A WebP header alone makes its decoder allocate the canvas twice, here two gigabytes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageRejectedError):
        decoder.decode(webp_bomb(16_383))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


def test_killed_child_is_replaced(decoder: Decoder) -> None:
    assert decoder.decode(encoded("PNG")).width == 90
    assert decoder._child is not None
    os.kill(decoder._child.pid, signal.SIGKILL)
    assert decoder.decode(encoded("PNG")).width == 90


def test_image_that_kills_every_child_is_rejected(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each child is killed once it has started."""
    start = decoder._start

    def start_and_kill() -> object:
        child = start()
        child.kill()
        return child

    monkeypatch.setattr(decoder, "_start", start_and_kill)
    with pytest.raises(ImageRejectedError) as caught:
        decoder.decode(encoded("PNG"))
    assert caught.value.reason == "decode_error"


def test_jpeg_with_many_scans_is_decoded_in_child(decoder: Decoder) -> None:
    plain = encoded("JPEG")
    start = plain.index(b"\xff\xda")
    decoder.decode(plain)
    assert decoder._child is None
    with suppress(ImageRejectedError):
        decoder.decode(plain[:start] + plain[start:-2] * 9 + plain[-2:])
    assert decoder._child is not None


def segment(kind: int, body: bytes) -> bytes:
    return b"\xff" + bytes([kind]) + struct.pack(">H", len(body) + 2) + body


EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"
HEADERS = {
    "many parts": segment(0xFE, b"x") * 201,
    "exif in parts": segment(0xE1, EXIF + bytes(60_000)) * 18,
    "a byte at a time": segment(0xFE, b"x") + bytes(3000),
    "fill bytes": b"\xff" * 3000,
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=list(HEADERS))
def test_jpeg_with_long_header_is_opened_in_child(decoder: Decoder, header: bytes) -> None:
    plain = encoded("JPEG")
    found = decoder.decode(plain[:2] + header + plain[2:])
    assert decoder._child is not None
    assert (found.pixels == decoder.decode(plain).pixels).all()


def test_camera_jpeg_is_opened_in_process(decoder: Decoder) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    options = {"exif": exif, "icc_profile": profile + bytes(500_000), "comment": b"by us"}
    found = decoder.decode(encoded("JPEG", **options))
    assert (found.width, found.height) == (60, 90)
    assert decoder._child is None


def test_mpo_gives_first_image(decoder: Decoder) -> None:
    buffer = io.BytesIO()
    first, second = (Image.new("RGB", (64, 48), colour) for colour in ("red", "blue"))
    first.save(buffer, "MPO", save_all=True, append_images=[second])
    found = decoder.decode(buffer.getvalue())
    assert found.suffix == "jpg"
    assert found.pixels[16, 16, 0] > 200


def test_decoder_keeps_reason_of_rejected_image(decoder: Decoder) -> None:
    for data, reason in (
        (b"", "not_an_image"),
        (b"\xff\xd8\xff junk", "not_an_image"),
        (encoded("PNG")[:500], "decode_error"),
        (encoded("PNG", (400, 8)), "too_small"),
    ):
        with pytest.raises(ImageRejectedError) as caught:
            decoder.decode(data)
        assert caught.value.reason == reason
