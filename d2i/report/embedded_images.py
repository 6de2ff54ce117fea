"""Images as data URIs, so that a page is one file."""

from __future__ import annotations

import base64
import io

from PIL import Image

from d2i.images.decode import turn_upright
from d2i.images.png_chunks import without_metadata

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_MAX_SIDE_PX = 480
_MAX_BYTES = 120_000
_MAX_MEGAPIXELS = 90


def image_uri(data: bytes | None) -> str | None:
    """Return an image as a data URI, downscaled if it is large; None if it cannot be read.

    Only small still images in PNG, JPEG or WebP pass unchanged, except for their metadata.
    """
    if data is None:
        return None
    try:
        data = without_metadata(data)
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > _MAX_MEGAPIXELS * 1_000_000:
                return None
            kind, animated = str(image.format), getattr(image, "n_frames", 1) > 1
            fits = max(image.size) <= _MAX_SIDE_PX and len(data) <= _MAX_BYTES
            image.load()
            if animated or kind == "GIF" or not fits:
                kind, data = "JPEG", _reduced(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode('ascii')}"


def _reduced(image: Image.Image) -> bytes:
    turn_upright(image)
    small = image.convert("RGB")
    small.thumbnail((_MAX_SIDE_PX, _MAX_SIDE_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()
