"""The decode policy: what becomes a picture, and which reason all else gets."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from PIL import Image, ImageCms

from d2i.config import ImageConfig
from d2i.image_decode import (
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


def saved(image: Image.Image, form: str, **options: object) -> bytes:
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


def test_sixteen_bits_are_scaled() -> None:
    grey = Image.fromarray(np.full((64, 64), 0x7FFF, np.uint16))
    assert np.asarray(decode_image(saved(grey, "PNG"), LIMITS).image).mean() == 127


def test_alpha_lies_over_white_and_orientation_is_applied() -> None:
    clear = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    assert np.asarray(decode_image(saved(clear, "PNG"), LIMITS).image).min() == 255
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode_image(saved(noise((40, 20)), "JPEG", exif=exif), LIMITS).image
    assert turned.size == (20, 40)


@pytest.mark.parametrize("mode", ["CMYK", "L", "1", "P"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    form = "JPEG" if mode in ("CMYK", "L") else "PNG"
    assert decode_image(saved(noise((32, 32), mode), form), LIMITS).image.mode == "RGB"


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(data, LIMITS).image.getpixel((5, 5)) == (255, 0, 0)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "MPO"])
def test_what_can_be_decoded_begins_as_a_picture(form: str) -> None:
    data = saved(noise((32, 32)), form)
    assert decode_image(data, LIMITS).image.size == (32, 32)
    assert begins_as_image(data)


def test_reasons() -> None:
    assert reason(b"") == "not_an_image"
    assert reason(b"<html></html>") == "not_an_image"
    assert reason(b"<svg xmlns='http://www.w3.org/2000/svg'/>") == "not_an_image"
    assert reason(saved(noise((32, 32)), "BMP")) == "not_an_image"
    assert reason(saved(noise((400, 8)), "PNG")) == "too_small"
    assert reason(saved(noise((800, 20)), "PNG")) == "odd_aspect"
    assert reason(saved(Image.new("1", (12000, 12000)), "PNG")) == "too_large"


def test_a_cut_picture_is_never_half_a_picture() -> None:
    for form in ("JPEG", "PNG"):
        data = saved(noise((64, 64)), form)
        for share in (0.3, 0.5, 0.9):
            assert reason(data[: int(len(data) * share)]) in ("decode_error", "not_an_image")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF"])
def test_random_bytes_never_end_a_job(form: str) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x8827] = 6, "a photograph", 100
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    metadata = {} if form == "GIF" else {"exif": exif, "icc_profile": profile}
    # Little of the file is pixels, so that most changes hit what describes them.
    data = bytearray(saved(Image.new("RGB", (24, 24), "red"), form, **metadata))
    rng = random.Random(0)
    for _ in range(500):
        mutated = bytearray(data)
        for _ in range(rng.randrange(1, 8)):
            mutated[rng.randrange(len(mutated))] = rng.randrange(256)
        try:
            assert decode_image(bytes(mutated), LIMITS).image.mode == "RGB"
        except ImageRejectedError as err:
            assert err.reason


def test_the_crop_is_the_centre_square() -> None:
    picture = Image.new("RGB", (300, 100), "white")
    picture.paste("red", (100, 0, 200, 100))
    square = crop_to_square(picture, 64)
    assert square.size == (64, 64)
    assert square.getpixel((32, 32)) == (255, 0, 0)
    assert crop_to_square(Image.new("RGB", (7, 91)), 64).size == (64, 64)


def square(data: bytes, resolution: int, *, draft: bool) -> CroppedImage:
    limits = ImageConfig(resolution=resolution, draft=draft)
    return decode_square(open_header(data, limits), limits)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("size", [(400, 300), (301, 533), (800, 256), (999, 1333)])
def test_a_draft_is_the_same_square_but_for_little(size: tuple[int, int], orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    smooth = noise((12, 9)).resize(size, Image.Resampling.BICUBIC)
    data = saved(smooth, "JPEG", quality=95, exif=exif)
    exact, drafted = (square(data, 64, draft=draft) for draft in (False, True))
    whole = decode_image(data, LIMITS).image
    assert (exact.pixels == np.asarray(crop_to_square(whole, 64))).all()
    assert (drafted.width, drafted.height) == (exact.width, exact.height) == whole.size
    difference = np.abs(drafted.pixels.astype(int) - exact.pixels)
    assert difference.mean() < 0.5
    assert difference.max() <= 8


def test_a_picture_under_four_times_the_resolution_is_no_draft() -> None:
    data = saved(noise((255, 300)), "JPEG")
    exact, same = (square(data, 64, draft=draft).pixels for draft in (False, True))
    assert (exact == same).all()
    data = saved(noise((256, 300)), "JPEG")
    exact, other = (square(data, 64, draft=draft).pixels for draft in (False, True))
    assert (exact != other).any()


def test_a_picture_of_its_size_keeps_every_pixel() -> None:
    picture = noise((64, 64))
    assert (square(saved(picture, "PNG"), 64, draft=True).pixels == np.asarray(picture)).all()


def test_the_square_is_cut_before_it_is_resized() -> None:
    """What lies beside it has no part in its edge."""
    picture = Image.new("RGB", (300, 100), "white")
    picture.paste("red", (100, 0, 200, 100))
    assert (np.asarray(crop_to_square(picture, 64)) == (255, 0, 0)).all()


def test_png_bytes_keep_pixels_and_settings() -> None:
    pixels = np.asarray(noise((16, 16)))
    image = Image.open(io.BytesIO(png_bytes(pixels, {"seed": "3"})))
    assert (np.asarray(image) == pixels).all()
    assert image.info["seed"] == "3"
    assert png_bytes(pixels) == png_bytes(pixels)


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_colours_are_converted_also_under_alpha_and_in_palettes(mode: str) -> None:
    """A profile whose red and green are exchanged shows whether it was looked at."""
    usual = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = usual.replace(b"rXYZ", b"swap").replace(b"gXYZ", b"rXYZ").replace(b"swap", b"gXYZ")
    picture = Image.new("RGB", (64, 64), (200, 60, 30))
    other = picture.convert("RGBA") if mode == "RGBA" else picture.quantize(4)
    plain, converted = (
        np.asarray(decode_image(saved(image, "PNG", icc_profile=profile), LIMITS).image, int)
        for image in (picture, other)
    )
    assert np.abs(plain - np.asarray(picture, int)).max() > 20
    assert np.abs(converted - plain).max() <= 2
