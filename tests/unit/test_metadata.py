"""Metadata decides about no pixel: what every viewer shows is read, whatever lies beside it."""

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
from d2i.file_kind import file_kind
from d2i.image_decode import ImageRejectedError, decode_image
from d2i.png_chunks import MAX_INFLATED_BYTES, SIGNATURE, without_metadata
from d2i.preprocess.decoder import Decoder
from d2i.report.html import image_uri

LIMITS = ImageConfig(resolution=32)
SIDE = 48
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), np.uint8))
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><tiff:Orientation>6</tiff:Orientation></x:xmpmeta>'


def saved(form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    PHOTO.save(buffer, form, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", len(body), kind) + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunks(*chunks: bytes, at_end: bool = False) -> bytes:
    """Put chunks behind the header of a plain PNG, or behind its pixels."""
    data = saved("PNG")
    place = len(data) - 12 if at_end else len(SIGNATURE) + 25
    return data[:place] + b"".join(chunks) + data[place:]


def pixels(data: bytes) -> bytes:
    return decode_image(data, LIMITS).image.tobytes()


LONG = zlib.compress(b"node " * 300_000)
PLAIN = saved("PNG")
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


@pytest.mark.parametrize("place", ["before", "behind"])
@pytest.mark.parametrize("name", DAMAGED)
def test_no_chunk_beside_the_picture_decides_about_it(name: str, place: str) -> None:
    data = with_chunks(DAMAGED[name], at_end=place == "behind")
    assert pixels(data) == pixels(PLAIN)
    assert image_uri(data) is not None


def test_what_decides_pixels_is_kept() -> None:
    """Turning, by EXIF and by XMP, and colours, also by a profile of megabytes."""
    turned = PHOTO.transpose(Image.Transpose.ROTATE_270).tobytes()
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp, raw = PngInfo(), PngInfo()
    xmp.add_itxt("XML:com.adobe.xmp", XMP.decode(), zip=True)
    hexed = b"Exif\0\0".hex() + exif.tobytes().hex()
    raw.add_text("Raw profile type exif", f"\nexif\n{len(hexed) // 2:8}\n{hexed}\n", zip=True)
    for options in ({"exif": exif}, {"pnginfo": xmp}, {"pnginfo": raw}):
        assert pixels(saved("PNG", **options)) == turned
    late = chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    assert pixels(with_chunks(late, at_end=True)) == turned
    wide = bytearray(PROFILE)
    # The red primary elsewhere: another space than sRGB.
    (place,) = struct.unpack_from(">I", PROFILE, PROFILE.index(b"rXYZ") + 4)
    wide[place + 8 : place + 12] = struct.pack(">i", 0x9000)
    small, large = (saved("PNG", icc_profile=bytes(wide) + bytes(n)) for n in (0, 3 << 20))
    assert pixels(small) == pixels(large) != pixels(PLAIN)


def metadata_spans(data: bytes) -> list[tuple[int, int]]:
    """Say where a file's metadata lies, lengths and names left aside."""
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
def test_metadata_that_was_changed_at_random_never_costs_the_picture(form: str) -> None:
    exif = Image.Exif()
    exif[0x010E], exif[0x8827] = "a photograph", 100
    text = PngInfo()
    text.add_text("Raw profile type exif", "\nexif\n      10\n" + "45" * 10, zip=True)
    extra = {"pnginfo": text} if form == "PNG" else {"xmp": XMP.replace(b"6", b"1")}
    data = saved(form, exif=exif, icc_profile=PROFILE, **extra)
    spans = metadata_spans(data)
    assert len(spans) >= 3
    rng = random.Random(0)
    for _ in range(200):
        mutated = bytearray(data)
        for _ in range(rng.randrange(1, 6)):
            start, stop = rng.choice(spans)
            mutated[rng.randrange(start, stop)] = rng.randrange(256)
        assert decode_image(bytes(mutated), LIMITS).image.size == (SIDE, SIDE)


def test_a_header_that_is_damaged_is_named() -> None:
    header = bytearray(PLAIN)
    header[len(SIGNATURE) + 8 + 13] ^= 1
    for data, reason, detail in (
        (bytes(header), "decode_error", "PNG: wrong checksum of its chunk IHDR"),
        (b"\xff\xd8\xff junk", "not_an_image", "begins as JPEG, but its header is damaged"),
    ):
        with pytest.raises(ImageRejectedError, match=detail) as caught:
            decode_image(data, LIMITS)
        assert caught.value.reason == reason


def test_a_picture_that_ends_within_its_metadata_is_whole_and_within_its_pixels_is_not() -> None:
    data = with_chunks(chunk(b"tEXt", b"a\0" + b"b" * 500), at_end=True)
    assert pixels(data[:-100]) == pixels(PLAIN)
    with pytest.raises(ImageRejectedError):
        pixels(PLAIN[:-200])


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    made = Decoder(LIMITS, timeout_s=20.0, max_decode_mib=512)
    yield made
    made.close()


def test_texts_that_unpack_to_very_much_cost_little(decoder: Decoder) -> None:
    bomb = zlib.compress(bytes(90 << 20))
    bombs = [chunk(b"zTXt", b"Raw profile type exif\0\0" + bomb)] * 9
    data = with_chunks(chunk(b"iCCP", b"a\0\0" + bomb), *bombs)
    tracemalloc.start()
    assert without_metadata(data) == PLAIN
    assert tracemalloc.get_traced_memory()[1] < 60 << 20
    tracemalloc.stop()
    assert decoder.decode(data).width == SIDE


KINDS = {
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "AVIF": b"\0\0\0\x1cftypavif\0\0\0\0",
    "BMP": saved("BMP"),
    "TIFF": saved("TIFF"),
    "SVG": b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- a - b -->\n<svg xmlns=''/>",
    "a web page": b"\n<!DOCTYPE html><html></html>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "an empty file": b"",
    "gzip": b"\x1f\x8b\x08\0",
    "an AppleDouble file of macOS": b"\0\5\x16\7\0\2\0\0Mac OS X        ",
}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_no_picture_is_named(name: str) -> None:
    assert file_kind(KINDS[name]) == name
    with pytest.raises(ImageRejectedError) as caught:
        decode_image(KINDS[name], LIMITS)
    assert (caught.value.reason, str(caught.value)) == (
        "not_an_image",
        f"got {name}, expected JPEG, PNG, WebP or GIF",
    )


def test_telling_a_kind_takes_no_time_for_any_bytes() -> None:
    """Comments in comments make some patterns look again and again."""
    for part in (b"<!--", b"<!---->", b"<!-- --", b"<?xml ", b" \n", b"<svg", b"\0"):
        with suppress(UnicodeError):
            assert file_kind(part * 1000) != "JPEG"
    assert file_kind(b"no picture") is None
