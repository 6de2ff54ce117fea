"""Image decoding: the decode policy, the square crop every stage works on, and PNG encoding.

Formats are an allow-list; the size in the header is checked before any pixel is decoded. Must not
import torch.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError

from d2i.config import ImageConfig
from d2i.images.file_kind import file_kind
from d2i.images.png_chunks import MAX_INFLATED_BYTES, without_metadata

RESIZE = "centre crop, lanczos"
"""The crop and resize of an image, as fingerprints and metric cards name it."""
_SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif"}
_KINDS = frozenset({"JPEG", "PNG", "WebP", "GIF"})
_NO_KIND = "neither JPEG, PNG, WebP nor GIF"
_LFS_POINTER = "a Git LFS pointer"
# Longer colour profiles were removed before (`without_metadata`).
PngImagePlugin.MAX_TEXT_CHUNK = MAX_INFLATED_BYTES
# Pillow's name for a JPEG that holds several images; the first is used.
_MANY_JPEGS = "MPO"
_ORIENTATION = 0x0112
_MAX_KEPT_BYTES = 1 << 16
"""Transforms of colour profiles up to this length are cached; usual ones have a few kilobytes."""
_DRAFT_FACTOR = 2
"""A draft's crop has at least this many times the pixels of the square per side (our default)."""


@dataclass(frozen=True)
class SharedImage:
    """One decoded image: RGB, upright, first frame, over white."""

    image: Image.Image
    suffix: str


@dataclass(frozen=True)
class CroppedImage:
    """An image's centre square, uint8 (R, R, 3), and the suffix and size of the whole image."""

    pixels: NDArray[np.uint8]
    suffix: str
    width: int
    height: int


class ImageRejectedError(Exception):
    """The bytes are not a usable image; `reason` is the reason class in the ledger."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def begins_as_image(data: bytes) -> bool:
    """Return whether bytes begin like a JPEG, PNG, WebP or GIF; the rest is not checked."""
    return file_kind(data) in _KINDS


def is_lfs_pointer(data: bytes) -> bool:
    """Return whether a file is a Git LFS pointer, in place of content that was not fetched."""
    return file_kind(data) == _LFS_POINTER


def no_image(data: bytes) -> str:
    """Return a description of a file that is not a readable image."""
    kind = file_kind(data)
    if kind in _KINDS:
        return f"begins as {kind}, but its header is damaged"
    return f"got {kind}, expected JPEG, PNG, WebP or GIF" if kind else _NO_KIND


def decode_image(data: bytes, limits: ImageConfig) -> SharedImage:
    """Decode JPEG, PNG, WebP or GIF bytes.

    EXIF orientation is applied, colour profiles and CMYK become sRGB, 16 bits are scaled to 8,
    alpha is blended over white, and only the first frame of an animation is used. Damaged, unknown
    or oversized metadata is ignored.

    Raises:
        ImageRejectedError: `not_an_image`, `too_large`, `too_small`, `odd_aspect` or
            `decode_error`; a truncated image is never half decoded.
    """
    with _decoding():
        image = _open(data, limits)
        return SharedImage(_to_rgb(image), _suffix(image))


def open_header(data: bytes, limits: ImageConfig) -> Image.Image:
    """Read the header of an image, and decode nothing.

    Raises:
        ImageRejectedError: `not_an_image`, `too_large`, `too_small`, `odd_aspect` or
            `decode_error`.
    """
    with _decoding():
        return _open(data, limits)


def decode_square(image: Image.Image, limits: ImageConfig) -> CroppedImage:
    """Decode as `decode_image` does, and crop as `crop_to_square` does.

    With `limits.draft` a JPEG whose short side is four times the resolution or more is decoded at
    half its size, or less, by the decoder itself, and never below twice the resolution.

    Args:
        image: The result of `open_header`; it is consumed.
        limits: The decode policy and the resolution.

    Raises:
        ImageRejectedError: As `decode_image` does; also `too_small` beyond `limits.max_upscale`.
    """
    with _decoding():
        if problem := limits.upscale_problem(*image.size):
            raise ImageRejectedError("too_small", problem)
        width, height = image.size
        scale = _draft(image, limits.resolution) if limits.draft else 1.0
        drafted = image.size
        upright = _to_rgb(image)
        if upright.size != drafted:
            width, height = height, width
        square = (
            crop_to_square(upright, limits.resolution)
            if scale == 1.0
            else _crop_drafted(upright, (width, height), scale, limits.resolution)
        )
        return CroppedImage(np.asarray(square), _suffix(image), width, height)


def crop_to_square(image: Image.Image, resolution: int) -> Image.Image:
    """Crop the centre square and resize it with LANCZOS (`datasets.py:419-430` of U-ViT)."""
    left, top, side = _centre(image.size)
    square = image.crop((left, top, left + side, top + side))
    if side == resolution:
        # Resizing would only copy it.
        return square
    return square.resize((resolution, resolution), Image.Resampling.LANCZOS)


def png_bytes(pixels: NDArray[np.uint8], metadata: Mapping[str, str] | None = None) -> bytes:
    """Encode uint8 (H, W, 3) as PNG, with text chunks; the same input gives the same bytes."""
    chunks = PngImagePlugin.PngInfo()
    for name, value in (metadata or {}).items():
        chunks.add_itxt(name, value)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    """Turn the exceptions of decoders into `ImageRejectedError` with a reason."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Image.DecompressionBombError as err:
        raise ImageRejectedError("too_large", str(err)) from err
    except (ImageRejectedError, MemoryError):
        raise
    except Exception as err:
        # Damaged bytes make decoders raise anything: struct.error, TypeError, KeyError.
        raise ImageRejectedError("decode_error", f"{type(err).__name__}: {err}") from err


def _open(data: bytes, limits: ImageConfig) -> Image.Image:
    """Read an image's header, and check the size, before the cost of decoding."""
    try:
        lean = without_metadata(data)
    except ValueError as err:
        raise ImageRejectedError("decode_error", str(err)) from err
    try:
        image = Image.open(io.BytesIO(lean), formats=tuple(_SUFFIXES))
    except UnidentifiedImageError as err:
        raise ImageRejectedError("not_an_image", no_image(data)) from err
    _check_size(image, limits)
    return image


def _suffix(image: Image.Image) -> str:
    return "jpg" if image.format == _MANY_JPEGS else _SUFFIXES[str(image.format)]


def _draft(image: Image.Image, resolution: int) -> float:
    """Let a JPEG's decoder halve it while enough pixels are left; return the reduction factor."""
    least = _DRAFT_FACTOR * resolution
    if min(image.size) < 2 * least:
        return 1.0
    width, height = image.size
    scale = next(s for s in (8, 4, 2) if min(image.size) >= s * least)
    if (width % scale or height % scale) and _orientation(image) != 1:
        # The last pixels of a draft cover fewer of the image's, and rotated they would come first.
        return 1.0
    drafted = image.draft("RGB", (least, least))
    return 1.0 if drafted is None else width / drafted[1][2]


def _crop_drafted(
    drafted: Image.Image, whole: tuple[int, int], scale: float, resolution: int
) -> Image.Image:
    """Crop the square of the whole image from its draft; it may begin within a draft's pixel."""
    left, top, side = _centre(whole)
    right, bottom = ((begin + side) / scale for begin in (left, top))
    width, height = drafted.size
    box = (left / scale, top / scale, min(right, width), min(bottom, height))
    return drafted.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)


def _centre(size: tuple[int, int]) -> tuple[int, int, int]:
    """Return left, top and side of the centre square."""
    width, height = size
    side = min(size)
    return (width - side) // 2, (height - side) // 2, side


def _check_size(image: Image.Image, limits: ImageConfig) -> None:
    short, long = sorted(image.size)
    if short * long > limits.max_megapixels * 1e6:
        raise ImageRejectedError("too_large", f"{image.size[0]}x{image.size[1]} pixels")
    if short < limits.min_side:
        raise ImageRejectedError("too_small", f"{image.size[0]}x{image.size[1]} pixels")
    if long > short * limits.max_aspect:
        raise ImageRejectedError("odd_aspect", f"{image.size[0]}x{image.size[1]} pixels")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return the image upright in RGB; the one given is consumed."""
    image.load()
    profile = image.info.get("icc_profile")
    turn_upright(image)
    upright = image
    if upright.mode.startswith("I"):
        upright = Image.fromarray((np.asarray(upright, dtype=np.uint32) >> 8).astype(np.uint8))
    if upright.mode in ("LA", "PA", "RGBA") or "transparency" in upright.info:
        return _over_white(upright.convert("RGBA"), profile)
    if upright.mode == "P":
        upright = upright.convert("RGB")
    if profile and upright.mode in ("RGB", "CMYK"):
        upright = _to_srgb(upright, profile)
    return upright if upright.mode == "RGB" else upright.convert("RGB")


def turn_upright(image: Image.Image) -> None:
    """Rotate an image as its EXIF says; damaged EXIF is ignored."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # The TIFF reader raises SyntaxError, struct.error, KeyError, …
        return


def _orientation(image: Image.Image) -> object:
    """Return an image's EXIF orientation, 1 if it cannot be read."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:
        return 1


def _over_white(layered: Image.Image, profile: bytes | None) -> Image.Image:
    """Blend RGBA over white, with colours converted before the blend."""
    if profile:
        colours = _to_srgb(layered.convert("RGB"), profile)
        colours.putalpha(layered.getchannel("A"))
        layered = colours
    white = Image.new("RGBA", layered.size, "white")
    return Image.alpha_composite(white, layered).convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert from a colour profile to sRGB; under a broken profile, pixels are taken as sRGB."""
    build = _transform if len(profile) <= _MAX_KEPT_BYTES else _transform.__wrapped__
    try:
        transform = build(profile, image.mode)
        return ImageCms.applyTransform(image, transform) or image
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    """Build a profile's colour transform, which takes as long as decoding the image."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
