"""Export of test dialogs in MMDialog's own layout, for systems that run elsewhere.

MiniGPT-5's data set class reads JSON lines of `conversation_id` and `conversation`. It uses only
the first image of a turn, ends a dialog at an empty text, at a text that ends in `.jpg` and at an
image whose file is missing, and skips dialogs of fewer than two turns. The export writes one dialog
per instance, so that none of these rules drops an instance; the media key of the image to generate
is the instance's key. Must not import torch.
"""

from __future__ import annotations

import json
from typing import Any

from d2i.errors import DataError
from d2i.io import storage
from d2i.shards import ShardReader

DIALOGS_NAME = "conversations.json"


def export_dialogs(data_url: str, out_url: str) -> int:
    """Write `OUT/test/conversations.json` and the reference images; return the number of dialogs.

    The images are JPEG like MMDialog's, named `{key}.jpg`. The system under evaluation generates
    its own image for each; evaluate these as `images:DIR`, in files named by the same keys.

    Raises:
        DataError: If the data set has no instance.
    """
    reader = ShardReader(data_url)
    if not len(reader):
        raise DataError(f"{data_url} has no samples; expected a test split; check --data")
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
    texts = [_readable(turn["text"].strip()) for turn in context if turn["text"].strip()]
    # At least one turn must come before the turn of the image.
    before, own = (texts[:-1], texts[-1]) if len(texts) > 1 else (texts or ["..."], "...")
    turns = [[{"__TEXT__": text}] for text in before]
    turns.append([{"__TEXT__": own}, {"__MEDIA__": key}])
    return {"conversation_id": number, "conversation": [{"turn": parts} for parts in turns]}


def _readable(text: str) -> str:
    return f"{text} ." if text.endswith(".jpg") else text
