"""The demo's corpus: made (synthetic) dialogs with their images, in MMDialog's own layout.

`{train,valid,test}/conversations.json` (one object per line) beside flat `<media_key>.jpg`, and
`scenes.jsonl` with the scene of each image, which only the judge reads. `corpus.json` marks it as
the made world, despite its layout. A few images are broken on purpose, as in every real corpus.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2i.demo.dialogs import MadeTurn, make_dialog
from d2i.demo.render import render_scene
from d2i.demo.scene import Scene, split_scenes

NAME = "made world"
_JPEG_QUALITY = 95
_SPLIT_SHARES = {"train": 0.84, "valid": 0.04, "test": 0.12}
_SECOND_SCENE_SHARE = 0.2
# One image in this many is broken; none of the test split, as that is scored.
_BROKEN_EVERY = 100
_BREAKS = ("missing", "truncated", "not_an_image")


@dataclass(frozen=True)
class _Shared:
    """One image of the corpus: its key, the scene it shows, and the defect of its file, if any."""

    media_key: str
    scene: Scene
    damage: str | None


def write_corpus(out: Path, num_dialogs: int, seed: int) -> None:
    """Publish the corpus atomically; nothing is written if `out` exists.

    The same arguments give the same bytes. Test dialogs are about held-out scenes only, all
    others about scenes that are open to training (`d2i.demo.scene.is_held_out`).

    Args:
        out: Directory to create.
        num_dialogs: Dialogs over all splits: 84 % train, 4 % valid, 12 % test.
        seed: Seed of words, scenes and jitter.
    """
    if out.exists():
        return
    scratch = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    open_scenes, held_out = split_scenes()
    truth: list[dict[str, Any]] = []
    for split, share in _SPLIT_SHARES.items():
        scenes = held_out if split == "test" else open_scenes
        truth += _write_split(scratch / split, split, round(share * num_dialogs), scenes, seed)
    _write_lines(scratch / "scenes.jsonl", truth)
    (scratch / "corpus.json").write_text(json.dumps({"name": NAME}) + "\n")
    scratch.rename(out)


def _write_split(
    directory: Path, split: str, num_dialogs: int, scenes: list[Scene], seed: int
) -> list[dict[str, Any]]:
    directory.mkdir()
    rng = random.Random(f"{seed} {split}")
    conversations, truth = [], []
    for number in range(num_dialogs):
        second = rng.choice(scenes) if rng.random() < _SECOND_SCENE_SHARE else None
        turns = make_dialog(rng.choice(scenes), rng, second)
        images = [_share(split, number, i, turn, seed) for i, turn in enumerate(turns)]
        conversations.append(_conversation(number, turns, images))
        for shared in filter(None, images):
            _write_image(directory / f"{shared.media_key}.jpg", shared)
            truth.append(
                {"media_key": shared.media_key, "split": split, **shared.scene.attributes()}
            )
    _write_lines(directory / "conversations.json", conversations)
    return truth


def _share(split: str, number: int, turn: int, made: MadeTurn, seed: int) -> _Shared | None:
    if made.scene is None:
        return None
    digest = hashlib.blake2b(f"{seed} {split} {number} {turn}".encode(), digest_size=8).digest()
    # MMDialog's keys are signed 64-bit numbers, about half of them negative.
    media_key = int.from_bytes(digest, "big", signed=True)
    is_broken = split != "test" and media_key % _BROKEN_EVERY == 0
    damage = _BREAKS[media_key // _BROKEN_EVERY % len(_BREAKS)] if is_broken else None
    return _Shared(str(media_key), made.scene, damage)


def _conversation(
    number: int, turns: list[MadeTurn], images: list[_Shared | None]
) -> dict[str, Any]:
    return {
        "conversation_id": number,
        "conversation": [
            {"turn": list(_items(turn, shared))} for turn, shared in zip(turns, images, strict=True)
        ],
    }


def _items(turn: MadeTurn, shared: _Shared | None) -> Iterator[dict[str, str]]:
    yield {"__TEXT__": turn.text}
    if shared is not None:
        yield {"__MEDIA__": shared.media_key}


def _write_image(path: Path, shared: _Shared) -> None:
    if shared.damage == "missing":
        return
    if shared.damage == "not_an_image":
        path.write_text("<html><body>404 Not Found</body></html>\n")
        return
    buffer = io.BytesIO()
    image = render_scene(shared.scene, int(shared.media_key))
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    data = buffer.getvalue()
    path.write_bytes(data[: len(data) // 2] if shared.damage == "truncated" else data)


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
