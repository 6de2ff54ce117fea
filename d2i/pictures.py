"""Pictures: the decode policy, the square crop every stage works on, and PNG bytes.

Formats are an allow-list; what the header promises is checked before a pixel is decoded. Must
not import torch.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from d2i.config import ImageConfig

_SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif"}
# What Pillow calls a JPEG that holds several pictures; the first is taken.
_MANY_JPEGS = "MPO"


@dataclass(frozen=True)
class Picture:
    """One decoded picture: RGB, upright, first frame, over white."""

    image: Image.Image
    suffix: str


class RefusedPictureError(Exception):
    """The bytes are no usable picture; `reason` is its class in the ledger."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def decode_picture(data: bytes, limits: ImageConfig) -> Picture:
    """Decode JPEG, PNG, WebP or GIF bytes.

    EXIF orientation is applied, colour profiles and CMYK become sRGB, 16 bits are scaled to 8,
    alpha is laid over white, and of an animation the first frame is taken.

    Raises:
        RefusedPictureError: `not_an_image`, `too_large`, `too_small`, `odd_aspect` or
            `decode_error`; a truncated picture is never half decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=tuple(_SUFFIXES))
            _check_size(image, limits)
            suffix = "jpg" if image.format == _MANY_JPEGS else _SUFFIXES[str(image.format)]
            return Picture(_to_rgb(image), suffix)
    except UnidentifiedImageError as err:
        raise RefusedPictureError("not_an_image", "neither JPEG, PNG, WebP nor GIF") from err
    except Image.DecompressionBombError as err:
        raise RefusedPictureError("too_large", str(err)) from err
    except (RefusedPictureError, MemoryError):
        raise
    except Exception as err:
        # Decoders raise whatever a damaged byte leads them to: struct.error, TypeError, KeyError.
        raise RefusedPictureError("decode_error", f"{type(err).__name__}: {err}") from err


def crop_to_square(picture: Image.Image, resolution: int) -> Image.Image:
    """Resize the short side to `resolution` with LANCZOS and cut the centre square."""
    scale = resolution / min(picture.size)
    width, height = (max(resolution, round(side * scale)) for side in picture.size)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    return picture.crop((left, top, left + resolution, top + resolution))


def png_bytes(pixels: NDArray[np.uint8], metadata: Mapping[str, str] | None = None) -> bytes:
    """Encode uint8 (H, W, 3) as PNG, with text chunks; the same input gives the same bytes."""
    chunks = PngInfo()
    for name, value in (metadata or {}).items():
        chunks.add_itxt(name, value)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()


def _check_size(image: Image.Image, limits: ImageConfig) -> None:
    short, long = sorted(image.size)
    if short * long > limits.max_megapixels * 1e6:
        raise RefusedPictureError("too_large", f"{image.size[0]}x{image.size[1]} pixels")
    if short < limits.min_side:
        raise RefusedPictureError("too_small", f"{image.size[0]}x{image.size[1]} pixels")
    if long > short * limits.max_aspect:
        raise RefusedPictureError("odd_aspect", f"{image.size[0]}x{image.size[1]} pixels")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return the picture upright in RGB; the one given is used up."""
    image.load()
    profile = image.info.get("icc_profile")
    ImageOps.exif_transpose(image, in_place=True)
    upright = image
    if upright.mode.startswith("I"):
        upright = Image.fromarray((np.asarray(upright, dtype=np.uint32) >> 8).astype(np.uint8))
    if upright.mode in ("LA", "PA", "RGBA") or "transparency" in upright.info:
        layered = upright.convert("RGBA")
        white = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(white, layered).convert("RGB")
    if profile and upright.mode in ("RGB", "CMYK"):
        upright = _to_srgb(upright, profile)
    return upright if upright.mode == "RGB" else upright.convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(
            image, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError):
        # A broken profile says nothing about the pixels: they are taken as sRGB.
        return image
    return converted or image
