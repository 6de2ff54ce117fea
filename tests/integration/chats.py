"""Chats in JSONL whose images are URLs, and the responses of a server to them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from d2i.preprocess.ledger import read_ledger
from tests.servers import Answer


def noise_image(form: str = "JPEG", size: tuple[int, int] = (80, 64), **options: Any) -> bytes:
    pixels = np.random.default_rng(1).integers(0, 255, (size[1], size[0], 3), np.uint8)
    return encode_image(Image.fromarray(pixels), form, **options)


def encode_image(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def sends(body: bytes, status: int = 200, **headers: str) -> Answer:
    return lambda handler: handler.send(status, body, **headers)


def write_chats(directory: Path, urls: dict[str, list[str]]) -> Path:
    """Write one dialog with one image per entry of `urls`, named after it."""
    directory.mkdir()
    lines = [
        json.dumps({"id": name, "turns": [{"text": f"show me {name}", "images": [url]}]})
        for name, (url, *_) in urls.items()
    ]
    (directory / "test.jsonl").write_text("\n".join(lines))
    return directory


def reasons(out: Path) -> dict[str, str]:
    """Return the reason of each dialog in the ledger; each key must occur once."""
    rows = read_ledger(str(out / "test"))
    assert len({row.key for row in rows}) == len(rows)
    return {row.key.removeprefix("test-").removesuffix("-0-0"): row.reason for row in rows}


def ledger_facts(out: str, split: str) -> dict[str, tuple[object, ...]]:
    """Return what a ledger says of each image, but how it was obtained."""
    return {
        row.key: (row.reason, row.size_bytes, row.width, row.height, row.sha256)
        for row in read_ledger(f"{out}/{split}")
    }
