"""Image decoding: conversion to RGB squares, and the reasons for rejecting an image."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from PIL import Image, ImageCms

from d2i.config import ImageConfig
from d2i.images.decode import (
    CroppedImage,
    ImageRejectedError,
    begins_as_image,
    crop_to_square,
    decode_image,
    decode_square,
    open_header,
    png_bytes,
)

LIMITS = ImageConfig()


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def noise(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def reason(data: bytes) -> str:
    with pytest.raises(ImageRejectedError) as caught:
        decode_image(data, LIMITS)
    return caught.value.reason


def test_16_bit_image_is_scaled_to_8_bits() -> None:
    grey = Image.fromarray(np.full((64, 64), 0x7FFF, np.uint16))
    assert np.asarray(decode_image(encoded(grey, "PNG"), LIMITS).image).mean() == 127


def test_alpha_is_over_white_and_orientation_is_applied() -> None:
    clear = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    assert np.asarray(decode_image(encoded(clear, "PNG"), LIMITS).image).min() == 255
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode_image(encoded(noise((40, 20)), "JPEG", exif=exif), LIMITS).image
    assert turned.size == (20, 40)


@pytest.mark.parametrize("mode", ["CMYK", "L", "1", "P"])
def test_every_image_mode_becomes_rgb(mode: str) -> None:
    form = "JPEG" if mode in ("CMYK", "L") else "PNG"
    assert decode_image(encoded(noise((32, 32), mode), form), LIMITS).image.mode == "RGB"


def test_animation_gives_first_frame() -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(data, LIMITS).image.getpixel((5, 5)) == (255, 0, 0)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "MPO"])
def test_begins_as_image_accepts_every_decodable_format(form: str) -> None:
    data = encoded(noise((32, 32)), form)
    assert decode_image(data, LIMITS).image.size == (32, 32)
    assert begins_as_image(data)


def test_rejected_image_has_reason() -> None:
    assert reason(b"") == "not_an_image"
    assert reason(b"<html></html>") == "not_an_image"
    assert reason(b"<svg xmlns='http://www.w3.org/2000/svg'/>") == "not_an_image"
    assert reason(encoded(noise((32, 32)), "BMP")) == "not_an_image"
    assert reason(encoded(noise((400, 8)), "PNG")) == "too_small"
    assert reason(encoded(noise((800, 20)), "PNG")) == "odd_aspect"
    assert reason(encoded(Image.new("1", (12000, 12000)), "PNG")) == "too_large"


@pytest.mark.parametrize(
    ("max_upscale", "resolution", "shorter", "is_rejected"),
    [
        (1.5, 384, 256, False),
        (1.5, 384, 255, True),
        (1.5, 512, 342, False),
        (1.5, 512, 341, True),
        # 360 * 1.4 is below 504 in floating point.
        (1.4, 504, 360, False),
        (1, 64, 64, False),
        (1, 64, 63, True),
        (1.5, 64, 300, False),
        (None, 512, 16, False),
    ],
)
def test_max_upscale_rejects_only_images_beyond_it(
    max_upscale: float | None, resolution: int, shorter: int, *, is_rejected: bool
) -> None:
    limits = ImageConfig(resolution=resolution, max_upscale=max_upscale)
    for size in ((shorter, 2 * shorter), (2 * shorter, shorter)):
        header = open_header(encoded(noise(size), "JPEG"), limits)
        if is_rejected:
            with pytest.raises(ImageRejectedError, match=f"^{size[0]}x{size[1]} .*") as caught:
                decode_square(header, limits)
            assert caught.value.reason == "too_small"
            assert f"max_upscale={max_upscale} " in str(caught.value)
            assert f"got {resolution};" in str(caught.value)
        else:
            assert decode_square(header, limits).pixels.shape == (resolution, resolution, 3)


def test_max_upscale_leaves_images_of_evaluations_alone() -> None:
    """Other systems generate in other sizes, and are scored at one."""
    limits = ImageConfig(resolution=512, max_upscale=1)
    assert decode_image(encoded(noise((64, 64)), "PNG"), limits).image.size == (64, 64)


def test_truncated_image_is_rejected() -> None:
    for form in ("JPEG", "PNG"):
        data = encoded(noise((64, 64)), form)
        for share in (0.3, 0.5, 0.9):
            assert reason(data[: int(len(data) * share)]) in ("decode_error", "not_an_image")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF"])
def test_mutated_image_decodes_or_is_rejected(form: str) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x8827] = 6, "a photograph", 100
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    metadata = {} if form == "GIF" else {"exif": exif, "icc_profile": profile}
    # Few bytes of the file are pixels, so most mutations hit the headers and metadata.
    data = bytearray(encoded(Image.new("RGB", (24, 24), "red"), form, **metadata))
    rng = random.Random(0)
    for _ in range(500):
        mutated = bytearray(data)
        for _ in range(rng.randrange(1, 8)):
            mutated[rng.randrange(len(mutated))] = rng.randrange(256)
        try:
            assert decode_image(bytes(mutated), LIMITS).image.mode == "RGB"
        except ImageRejectedError as err:
            assert err.reason


def test_crop_to_square_takes_centre() -> None:
    original = Image.new("RGB", (300, 100), "white")
    original.paste("red", (100, 0, 200, 100))
    square = crop_to_square(original, 64)
    assert square.size == (64, 64)
    assert square.getpixel((32, 32)) == (255, 0, 0)
    assert crop_to_square(Image.new("RGB", (7, 91)), 64).size == (64, 64)


def square(data: bytes, resolution: int, *, draft: bool) -> CroppedImage:
    limits = ImageConfig(resolution=resolution, draft=draft)
    return decode_square(open_header(data, limits), limits)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("size", [(400, 300), (301, 533), (800, 256), (999, 1333)])
def test_draft_decode_is_close_to_exact(size: tuple[int, int], orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    smooth = noise((12, 9)).resize(size, Image.Resampling.BICUBIC)
    data = encoded(smooth, "JPEG", quality=95, exif=exif)
    exact, drafted = (square(data, 64, draft=draft) for draft in (False, True))
    whole = decode_image(data, LIMITS).image
    assert (exact.pixels == np.asarray(crop_to_square(whole, 64))).all()
    assert (drafted.width, drafted.height) == (exact.width, exact.height) == whole.size
    difference = np.abs(drafted.pixels.astype(int) - exact.pixels)
    assert difference.mean() < 0.5
    assert difference.max() <= 8


def test_draft_needs_four_times_the_resolution() -> None:
    data = encoded(noise((255, 300)), "JPEG")
    exact, same = (square(data, 64, draft=draft).pixels for draft in (False, True))
    assert (exact == same).all()
    data = encoded(noise((256, 300)), "JPEG")
    exact, other = (square(data, 64, draft=draft).pixels for draft in (False, True))
    assert (exact != other).any()


def test_image_at_resolution_keeps_every_pixel() -> None:
    original = noise((64, 64))
    assert (square(encoded(original, "PNG"), 64, draft=True).pixels == np.asarray(original)).all()


def test_crop_happens_before_resize() -> None:
    """Pixels beside the square do not bleed into its edge."""
    original = Image.new("RGB", (300, 100), "white")
    original.paste("red", (100, 0, 200, 100))
    assert (np.asarray(crop_to_square(original, 64)) == (255, 0, 0)).all()


def test_png_bytes_keep_pixels_and_settings() -> None:
    pixels = np.asarray(noise((16, 16)))
    image = Image.open(io.BytesIO(png_bytes(pixels, {"seed": "3"})))
    assert (np.asarray(image) == pixels).all()
    assert image.info["seed"] == "3"
    assert png_bytes(pixels) == png_bytes(pixels)


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_icc_profile_is_applied_with_alpha_and_palette(mode: str) -> None:
    """A profile with red and green exchanged shows if it was applied."""
    usual = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = usual.replace(b"rXYZ", b"swap").replace(b"gXYZ", b"rXYZ").replace(b"swap", b"gXYZ")
    original = Image.new("RGB", (64, 64), (200, 60, 30))
    other = original.convert("RGBA") if mode == "RGBA" else original.quantize(4)
    plain, converted = (
        np.asarray(decode_image(encoded(image, "PNG", icc_profile=profile), LIMITS).image, int)
        for image in (original, other)
    )
    assert np.abs(plain - np.asarray(original, int)).max() > 20
    assert np.abs(converted - plain).max() <= 2
