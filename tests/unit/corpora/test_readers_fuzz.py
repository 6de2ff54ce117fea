"""Damaged and hostile corpora never raise, escape the source directory or fill the memory."""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from d2i.corpora import RecordIssue, build_corpus, read_instances
from d2i.dialog import Instance, linearize

NUM_SEEDS, NUM_SOAK_SEEDS = 150, 40_000
MAX_PEAK_BYTES = 24 << 20

FILES = {
    "mmdialog": ["train/conversations.json", "train/conversations_2.json"],
    "photochat": ["train/train_00.json", "train/train_01.json"],
    "jsonl": ["train.jsonl"],
}
# Values that an attacker would use as an image name, an id or a text.
HOSTILE = [
    "../../etc/passwd",
    "/etc/passwd",
    "-rf",
    "~/x",
    "..",
    "a/../../b",
    "%2e%2e/secret/x.jpg",
    "photos/..%2f..%2fsecret/x.jpg",
    "photos/1.jpg#x",
    "file:///etc/passwd",
    "http://127.0.0.1/",
    "C:\\x",
    "\x00",
    "\ud83d",
    "x" * 5000,
    "<|endoftext|>",
    "zip://a::b",
    10**40,
    -1,
    1.5,
    True,
    None,
    [],
    {},
    [[[[]]]],
]
NOISE = [b"\xff\xfe", b"\x00", b'"', b"{", b"}", b"[", b"]", b"\\", b"\n", b"\\ud800", b"[" * 3000]


def records(corpus: str, rng: random.Random) -> list[dict[str, Any]]:
    """Return valid records of a corpus, all different."""
    return [_RECORDS[corpus](number, rng) for number in range(8)]


def _mmdialog(number: int, rng: random.Random) -> dict[str, Any]:
    turns = [
        [{"__TEXT__": f"text {rng.random()}"}, {"__MEDIA__": str(rng.getrandbits(60))}]
        for _ in range(rng.randint(1, 4))
    ]
    return {"conversation_id": number, "conversation": [{"turn": turn} for turn in turns]}


def _photochat(number: int, rng: random.Random) -> dict[str, Any]:
    return {
        "dialogue": [
            {"message": f"text {rng.random()}", "share_photo": False, "user_id": 1},
            {"message": "", "share_photo": True, "user_id": 0},
        ],
        "dialogue_id": number,
        "photo_description": "Objects in the photo: Cat",
        "photo_url": "https://farm1.staticflickr.com/1/2_o.jpg",
        "photo_id": f"train/{rng.getrandbits(60):x}",
    }


def _jsonl(number: int, rng: random.Random) -> dict[str, Any]:
    if number % 2:
        turn: dict[str, Any] = {"text": "see", "images": [f"p/{rng.random()}.jpg"], "speaker": 1}
        return {"id": number, "turns": [turn] * 2}
    parts = [
        {"type": "text", "text": "here"},
        {"type": "image_url", "image_url": {"url": f"p/{rng.random()}.jpg"}},
    ]
    return {"id": number, "messages": [{"role": "user", "content": parts}]}


_RECORDS = {"mmdialog": _mmdialog, "photochat": _photochat, "jsonl": _jsonl}


def plant(value: Any, rng: random.Random) -> Any:
    """Replace one value, somewhere within a record, by a hostile one, or drop a field."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = rng.choice(sorted(value))
        if rng.random() < 0.1:
            return {key: inner for key, inner in value.items() if key != name}
        return value | {name: plant(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        return [*value[:at], plant(value[at], rng), *value[at + 1 :]]
    return rng.choice(HOSTILE)


def damage(data: bytes, rng: random.Random) -> bytes:
    """Cut, overwrite, insert or repeat bytes at random positions."""
    for _ in range(rng.randint(0, 3)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            data = data[:at]
        elif kind == 1:
            data = data[:at] + rng.choice(NOISE) + data[at:]
        elif kind == 2:
            data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        else:
            data = data[:at] + data[at // 2 : at] + data[at:]
    return data


def mutated_corpus(directory: Path, corpus: str, seed: int) -> None:
    """Write one split of a corpus, with hostile values and damage drawn from the seed."""
    rng = random.Random(seed)
    made = [plant(record, rng) if rng.random() < 0.6 else record for record in records(corpus, rng)]
    made += made[: rng.randint(0, 2)]
    for number, name in enumerate(FILES[corpus]):
        part = made[number :: len(FILES[corpus])]
        text = rng.choice(["\n".join(map(json.dumps, part)), json.dumps(part, indent=1)])
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(damage(text.encode(), rng))


def read(directory: Path, corpus: str, **options: Any) -> tuple[list[Instance], list[RecordIssue]]:
    issues: list[RecordIssue] = []
    instances = read_instances(
        corpus, directory, "train", on_problem=issues.append, max_broken=1.0, **options
    )
    return list(instances), issues


def check(directory: Path, corpus: str, seed: int) -> int:
    """Read a mutated corpus; return how many instances it still has."""
    mutated_corpus(directory, corpus, seed)
    found, issues = read(directory, corpus, emoji="unicode")
    assert len({instance.key for instance in found}) == len(found)
    image_id = build_corpus(corpus, {}).image_id
    unique, same_issues = read(directory, corpus, emoji="unicode", repeated="unique")
    assert same_issues == issues
    first: dict[str, Instance] = {}
    for instance in found:
        first.setdefault(image_id(instance.image_ref), instance)
    assert unique == list(first.values())
    root = os.path.realpath(directory)
    for instance in found:
        assert linearize(instance.context).encode()
        for path_or_url in instance.image_ref.value:
            assert path_or_url.encode()
            if instance.image_ref.kind == "urls":
                assert path_or_url.lower().startswith(("http://", "https://"))
                continue
            assert not path_or_url.startswith("-")
            resolved = os.path.normpath(f"{root}/{path_or_url}")
            assert resolved.startswith(root + os.sep)
    assert found or issues
    assert all(issue.where.startswith(tuple(FILES[corpus])) for issue in issues)
    return len(found)


@pytest.mark.parametrize("corpus", sorted(FILES))
def test_mutated_corpora_never_raise_or_escape_source(tmp_path: Path, corpus: str) -> None:
    tracemalloc.start()
    found = sum(check(tmp_path, corpus, seed) for seed in range(NUM_SEEDS))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The mutations must leave something to read, or the test proves little.
    assert found > NUM_SEEDS
    assert peak_bytes < MAX_PEAK_BYTES


@pytest.mark.soak
@pytest.mark.parametrize("corpus", sorted(FILES))
def test_many_mutated_corpora_never_raise_or_escape_source(tmp_path: Path, corpus: str) -> None:
    for seed in range(NUM_SEEDS, NUM_SOAK_SEEDS):
        check(tmp_path, corpus, seed)


def test_dialog_with_oversized_contexts_is_skipped(tmp_path: Path) -> None:
    turns = [{"text": "x" * 2_000_000}, {"images": [f"{n}.jpg" for n in range(2000)]}]
    lines = [{"id": 0, "turns": turns}, {"id": 1, "turns": [{"text": "a", "images": ["b.jpg"]}]}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    issues: list[RecordIssue] = []
    found = list(read_instances("jsonl", tmp_path, "train", on_problem=issues.append))
    assert [instance.dialog_id for instance in found] == ["1"]
    assert [issue.reason for issue in issues] == ["too_large"]
