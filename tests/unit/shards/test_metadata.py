"""Damaged metadata never rejects an image or changes its pixels; orientation and colours apply."""

from __future__ import annotations

import io
import random
import re
import struct
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from d2i.config import ImageConfig
from d2i.images.decode import ImageRejectedError, decode_image
from d2i.images.file_kind import file_kind
from d2i.images.png_chunks import MAX_INFLATED_BYTES, SIGNATURE, without_metadata
from d2i.images.sandbox import Decoder
from d2i.report.embedded_images import image_uri

LIMITS = ImageConfig(resolution=32)
SIDE = 48
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), np.uint8))
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><tiff:Orientation>6</tiff:Orientation></x:xmpmeta>'


def encode_photo(form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    PHOTO.save(buffer, form, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", len(body), kind) + body + struct.pack(">I", zlib.crc32(kind + body))


def insert_chunks(*chunks: bytes, at_end: bool = False) -> bytes:
    """Insert chunks after the header of a plain PNG, or after its pixels."""
    data = encode_photo("PNG")
    offset = len(data) - 12 if at_end else len(SIGNATURE) + 25
    return data[:offset] + b"".join(chunks) + data[offset:]


def pixels(data: bytes) -> bytes:
    return decode_image(data, LIMITS).image.tobytes()


LONG = zlib.compress(b"node " * 300_000)
PLAIN = encode_photo("PNG")
DAMAGED = {
    "compressed text": chunk(b"zTXt", b"prompt\0\0" + LONG),
    "international text": chunk(b"iTXt", b"workflow\0\1\0\0\0" + LONG),
    "text that is XMP": chunk(
        b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(20 << 20))
    ),
    "profile": chunk(b"iCCP", b"sRGB\0\0" + zlib.compress(PROFILE + bytes(MAX_INFLATED_BYTES))),
    "packed in an unknown way": chunk(b"zTXt", b"a\0\7bc"),
    "checksum": chunk(b"pHYs", b"\0\0\x0b\x13" * 2 + b"\1")[:-1] + b"?",
    "checksum of a profile": chunk(b"iCCP", b"sRGB\0\0" + zlib.compress(PROFILE))[:-1] + b"?",
    "too short": chunk(b"gAMA", b"\0"),
    "EXIF": chunk(b"eXIf", b"no TIFF at all"),
    "frames in no order": chunk(b"acTL", struct.pack(">II", 9, 0)) + chunk(b"fcTL", bytes(26)) * 2,
    "unknown": chunk(b"prVt", b"x" * 100),
}


@pytest.mark.parametrize("position", ["before", "behind"])
@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_png_chunk_does_not_change_pixels(name: str, position: str) -> None:
    data = insert_chunks(DAMAGED[name], at_end=position == "behind")
    assert pixels(data) == pixels(PLAIN)
    assert image_uri(data) is not None


def test_orientation_and_colour_profile_are_applied() -> None:
    """Rotation by EXIF and by XMP, and colours, also by a profile of megabytes."""
    rotated = PHOTO.transpose(Image.Transpose.ROTATE_270).tobytes()
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp, raw = PngInfo(), PngInfo()
    xmp.add_itxt("XML:com.adobe.xmp", XMP.decode(), zip=True)
    hex_text = b"Exif\0\0".hex() + exif.tobytes().hex()
    raw.add_text("Raw profile type exif", f"\nexif\n{len(hex_text) // 2:8}\n{hex_text}\n", zip=True)
    for options in ({"exif": exif}, {"pnginfo": xmp}, {"pnginfo": raw}):
        assert pixels(encode_photo("PNG", **options)) == rotated
    late = chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    assert pixels(insert_chunks(late, at_end=True)) == rotated
    wide = bytearray(PROFILE)
    # Move the red primary: a colour space other than sRGB.
    (offset,) = struct.unpack_from(">I", PROFILE, PROFILE.index(b"rXYZ") + 4)
    wide[offset + 8 : offset + 12] = struct.pack(">i", 0x9000)
    small, large = (encode_photo("PNG", icc_profile=bytes(wide) + bytes(n)) for n in (0, 3 << 20))
    assert pixels(small) == pixels(large) != pixels(PLAIN)


def metadata_spans(data: bytes) -> list[tuple[int, int]]:
    """Return the byte spans of a file's metadata, without lengths and names."""
    if data.startswith(SIGNATURE):
        found = re.finditer(rb"(iCCP|eXIf|tEXt|zTXt|iTXt|pHYs)", data)
        return [
            (m.end(), m.end() + struct.unpack(">I", data[m.start() - 4 : m.start()])[0])
            for m in found
        ]
    if data.startswith(b"RIFF"):
        found = re.finditer(rb"(ICCP|EXIF|XMP )(....)", data, re.DOTALL)
        return [(m.end(), m.end() + struct.unpack("<I", m[2])[0]) for m in found]
    spans, start = [], 2
    while data[start + 1] != 0xDB:
        (length,) = struct.unpack_from(">H", data, start + 2)
        spans.append((start + 4, start + 2 + length))
        start += 2 + length
    return spans


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_randomly_corrupted_metadata_never_rejects_image(form: str) -> None:
    exif = Image.Exif()
    exif[0x010E], exif[0x8827] = "a photograph", 100
    text = PngInfo()
    text.add_text("Raw profile type exif", "\nexif\n      10\n" + "45" * 10, zip=True)
    extra = {"pnginfo": text} if form == "PNG" else {"xmp": XMP.replace(b"6", b"1")}
    data = encode_photo(form, exif=exif, icc_profile=PROFILE, **extra)
    spans = metadata_spans(data)
    assert len(spans) >= 3
    rng = random.Random(0)
    for _ in range(200):
        mutated = bytearray(data)
        for _ in range(rng.randrange(1, 6)):
            start, stop = rng.choice(spans)
            mutated[rng.randrange(start, stop)] = rng.randrange(256)
        assert decode_image(bytes(mutated), LIMITS).image.size == (SIDE, SIDE)


def test_damaged_header_is_named_in_rejection() -> None:
    header = bytearray(PLAIN)
    header[len(SIGNATURE) + 8 + 13] ^= 1
    for data, reason, detail in (
        (bytes(header), "decode_error", "PNG: wrong checksum of its chunk IHDR"),
        (b"\xff\xd8\xff junk", "not_an_image", "begins as JPEG, but its header is damaged"),
    ):
        with pytest.raises(ImageRejectedError, match=detail) as caught:
            decode_image(data, LIMITS)
        assert caught.value.reason == reason


def test_image_truncated_in_metadata_decodes_but_in_pixels_is_rejected() -> None:
    data = insert_chunks(chunk(b"tEXt", b"a\0" + b"b" * 500), at_end=True)
    assert pixels(data[:-100]) == pixels(PLAIN)
    with pytest.raises(ImageRejectedError):
        pixels(PLAIN[:-200])


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    made = Decoder(LIMITS, timeout_s=20.0, max_decode_mib=512)
    yield made
    made.close()


def test_decompression_bomb_in_png_text_uses_little_memory(decoder: Decoder) -> None:
    bomb = zlib.compress(bytes(90 << 20))
    bombs = [chunk(b"zTXt", b"Raw profile type exif\0\0" + bomb)] * 9
    data = insert_chunks(chunk(b"iCCP", b"a\0\0" + bomb), *bombs)
    tracemalloc.start()
    assert without_metadata(data) == PLAIN
    assert tracemalloc.get_traced_memory()[1] < 60 << 20
    tracemalloc.stop()
    assert decoder.decode(data).width == SIDE


KINDS = {
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "AVIF": b"\0\0\0\x1cftypavif\0\0\0\0",
    "BMP": encode_photo("BMP"),
    "TIFF": encode_photo("TIFF"),
    "SVG": b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- a - b -->\n<svg xmlns=''/>",
    "a web page": b"\n<!DOCTYPE html><html></html>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "an empty file": b"",
    "gzip": b"\x1f\x8b\x08\0",
    "an AppleDouble file of macOS": b"\0\5\x16\7\0\2\0\0Mac OS X        ",
}


@pytest.mark.parametrize("name", KINDS)
def test_file_kind_names_files_that_are_no_image(name: str) -> None:
    assert file_kind(KINDS[name]) == name
    with pytest.raises(ImageRejectedError) as caught:
        decode_image(KINDS[name], LIMITS)
    assert (caught.value.reason, str(caught.value)) == (
        "not_an_image",
        f"got {name}, expected JPEG, PNG, WebP or GIF",
    )


def test_file_kind_is_fast_on_adversarial_bytes() -> None:
    """Nested comments make some regular expressions backtrack."""
    for part in (b"<!--", b"<!---->", b"<!-- --", b"<?xml ", b" \n", b"<svg", b"\0"):
        with suppress(UnicodeError):
            assert file_kind(part * 1000) != "JPEG"
    assert file_kind(b"no picture") is None
