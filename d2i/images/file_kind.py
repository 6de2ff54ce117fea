"""File format detection by the first bytes, for error messages about unexpected files.

Must not import any part of d2i.
"""

from __future__ import annotations

import re

HEAD_BYTES = 1024
"""Number of leading bytes that identify a file."""

_IMAGES = re.compile(
    rb"(?P<JPEG>\xff\xd8\xff)|(?P<PNG>\x89PNG\r\n\x1a\n)|(?P<GIF>GIF8[79]a)|(?P<WebP>RIFF.{4}WEBP)",
    re.DOTALL,
)
_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"\0\0\1\0", "ICO"),
    (b"8BPS", "Photoshop (PSD)"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"%PDF-", "PDF"),
    (b"PK\3\4", "a zip archive"),
    (b"PK\5\6", "an empty zip archive"),
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "Zstandard"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!\x1a\7", "a RAR archive"),
    (b"\0\5\x16\7", "an AppleDouble file of macOS"),
    (b"\xff\xfe", "UTF-16 text"),
    (b"\xfe\xff", "UTF-16 text"),
    (b"PAR1", "Parquet"),
)
# In ISO base media files the brand comes after four bytes of length and `ftyp`.
_BRANDS = {
    b"avif": "AVIF",
    b"avis": "AVIF",
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"), "HEIC"),
    **dict.fromkeys((b"mif1", b"msf1"), "HEIF"),
}
_TAR, _TAR_MARK = 257, b"ustar"
_PROLOGUE = rb"(?:<\?xml[^>]*>|<!--(?:(?!-->).)*-->|\s)*"
_SVG = re.compile(_PROLOGUE + rb"(?:<!doctype svg[^>]*>\s*)?<svg[\s/>]", re.IGNORECASE | re.DOTALL)
_PAGE = re.compile(_PROLOGUE + rb"<(?:!doctype html|html|head|body)\b", re.IGNORECASE | re.DOTALL)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def file_kind(head: bytes) -> str | None:
    """Return the kind of a file, such as `HEIC` or `a web page`; None if unknown.

    Args:
        head: Its first `HEAD_BYTES`, or all of it.
    """
    if not head:
        return "an empty file"
    head = head[:HEAD_BYTES]
    if found := _IMAGES.match(head):
        return found.lastgroup
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12], "a video (ISO base media)")
    if head[_TAR:].startswith(_TAR_MARK):
        return "a tar"
    for beginning, name in _BEGINNINGS:
        if head.startswith(beginning):
            return name
    text = head.removeprefix(_BYTE_ORDER_MARK).lstrip()
    if _SVG.match(text):
        return "SVG"
    if _PAGE.match(text):
        return "a web page"
    if text.startswith(b"<?xml"):
        return "XML"
    if not head.strip(b"\0"):
        return "only zeros"
    return "JSON text" if text[:1] in (b"{", b"[") else None
