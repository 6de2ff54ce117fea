"""Test dialogs in MMDialog's own layout, for systems that run elsewhere.

MiniGPT-5's data set class reads JSON lines of `conversation_id` and `conversation`, takes the first
picture of a turn only, breaks a dialog off at an empty text, at one that ends in `.jpg` and at a
picture whose file is missing, and passes over dialogs of fewer than two turns. One dialog is
written for each instance, so that none of this loses one; the media key of the picture to draw is
the instance's key. Must not import torch.
"""

from __future__ import annotations

import json
from typing import Any

from d2i import storage
from d2i.errors import DataError
from d2i.shards import ShardReader

DIALOGS_NAME = "conversations.json"


def export_dialogs(data_url: str, out_url: str) -> int:
    """Write `OUT/test/conversations.json` and the true pictures beside it; return how many dialogs.

    The pictures are JPEG as MMDialog's are, under the names that the keys give; a system is to
    draw each anew. What it draws comes back as `images:DIR`, in files of the same names.

    Raises:
        DataError: If the data set has no instance.
    """
    reader = ShardReader(data_url)
    if not len(reader):
        raise DataError(f"{data_url} holds no sample; expected a test split; check --data")
    lines = []
    for index, key in enumerate(reader.keys):
        lines.append(json.dumps(_dialog(index, key, reader.read_json(index)["context"])))
        image = reader.read_image(index)
        if image is not None:
            storage.write_bytes(storage.join(out_url, "test", f"{key}.jpg"), image)
    data = "".join(f"{line}\n" for line in lines).encode()
    storage.write_bytes(storage.join(out_url, "test", DIALOGS_NAME), data)
    return len(lines)


def _dialog(number: int, key: str, context: list[dict[str, Any]]) -> dict[str, Any]:
    said = [_readable(turn["text"].strip()) for turn in context if turn["text"].strip()]
    # One turn at least must come before the picture's own.
    before, own = (said[:-1], said[-1]) if len(said) > 1 else (said or ["..."], "...")
    turns = [[{"__TEXT__": text}] for text in before]
    turns.append([{"__TEXT__": own}, {"__MEDIA__": key}])
    return {"conversation_id": number, "conversation": [{"turn": parts} for parts in turns]}


def _readable(text: str) -> str:
    return f"{text} ." if text.endswith(".jpg") else text
