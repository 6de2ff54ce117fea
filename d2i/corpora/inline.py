"""Images embedded in a record as `data:` URLs: decoded once, named by their sha256.

Must not import torch.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass

from d2i.corpora.records import RecordError
from d2i.dialog import ImageRef

MAX_INLINE_BYTES = 20 << 20
"""Default size limit of one embedded image; the same as that of a fetched image."""

_PREFIX = "inline:"
_SHA256_DIGITS = 64
_HEAD = re.compile(r"data:[^,]{0,256}?;base64\Z", re.IGNORECASE)
_MAX_HEAD = 512


@dataclass(frozen=True)
class InlineImages:
    """Handling of images embedded in records.

    Args:
        max_bytes: Size limit of one image.
        keep: Called with sha256 and content of each occurrence; None: images are only named.
    """

    max_bytes: int = MAX_INLINE_BYTES
    keep: Callable[[str, bytes], None] | None = None

    def ref_of(self, url: str) -> ImageRef:
        """Decode a `data:` URL, keep its content and return a reference to it.

        Raises:
            RecordError: `bad_image_ref` if it is not base64, `too_large` beyond `max_bytes`.
        """
        head, comma, _ = url[:_MAX_HEAD].partition(",")
        if not comma or not _HEAD.fullmatch(head):
            raise RecordError(
                "bad_image_ref", "expected a data: URL of the form data:TYPE;base64,…"
            )
        num_bytes = (len(url) - len(head) - 1) * 3 // 4
        if num_bytes > self.max_bytes + 2:
            detail = f"a data: URL of {num_bytes} bytes, expected at most {self.max_bytes}"
            raise RecordError("too_large", detail)
        try:
            data = base64.b64decode(url[len(head) + 1 :].encode("ascii"), validate=True)
        except (binascii.Error, UnicodeEncodeError) as err:
            raise RecordError("bad_image_ref", "expected a data: URL in valid base64") from err
        if not data:
            raise RecordError("bad_image_ref", "expected a data: URL that holds an image")
        sha256 = hashlib.sha256(data).hexdigest()
        if self.keep is not None:
            self.keep(sha256, data)
        return ImageRef("inline", (f"{_PREFIX}{sha256}",))


def is_data_url(text: str) -> bool:
    """Return whether a text is a `data:` URL."""
    return text[:5].lower() == "data:"


def inline_sha256(ref: ImageRef) -> str:
    """Return the sha256, in hexadecimal digits, of the image that an `inline` reference names.

    Raises:
        ValueError: If the reference holds no valid sha256.
    """
    prefix, name = ref.value[0][: len(_PREFIX)], ref.value[0][len(_PREFIX) :]
    if prefix != _PREFIX or not re.fullmatch(rf"[0-9a-f]{{{_SHA256_DIGITS}}}", name):
        raise ValueError(f"got {ref.value[0]!r}, expected {_PREFIX} and a sha256")
    return name
