"""A golden number for each purpose and salt that keys a random draw, a hash or a cache name.

A rename of a function changes only its call here; the numbers must stay the same.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from d2i.cluster import SharedActor
from d2i.corpora import read_instances
from d2i.demo.corpus import write_corpus
from d2i.demo.render import render_scene
from d2i.demo.scene import all_scenes, is_held_out
from d2i.dialog import ImageRef, Instance, key_order_hash, make_key
from d2i.diffusion.draws import SampleDraws, integers, normal, uniform
from d2i.eval.metrics.intervals import bca
from d2i.eval.metrics.retrieval_recall import choose_negatives
from d2i.eval.prompts import derangement
from d2i.fetch.rate_limiter import ShardedRateLimiter
from d2i.fetch.sources import interleave_by_host
from d2i.images import tar_index
from d2i.io import storage
from d2i.preprocess.plan.selection import SmallestRankSampler
from d2i.preprocess.plan.shard_assignment import ShardAssigner
from d2i.shards.commit import fingerprint_sha256
from d2i.train.data.data_order import DataOrder
from d2i.train.monitor.validation import choose_instances
from d2i.weights_catalog import shapes_hash

PURPOSES = (
    *("n", "latent", "noise", "drop", "n.text", "noise.clip", "noise.text"),
    *("valid.n", "valid.latent", "valid.noise", "valid.n.text", "valid.noise.clip"),
    *("valid.noise.text", "train.sample", "train.sample.clip", "train.sample.text"),
    *("sample", "sample.clip", "sample.text", "sample.step", "sample.pipeline"),
)
KEYS = [f"test-{number}-0-0" for number in range(12)]


def numbers(scratch: Path) -> dict[str, Any]:
    """Return the numbers by name; `scratch` is an empty directory.

    Only weights, random draws and hashes, so that nothing depends on the machine.
    """
    return {
        "draws": {purpose: drawn(purpose) for purpose in PURPOSES},
        "uniform": float(uniform(1, "drop", ["a"], 2)[0]),
        "integers": int(integers(1, 1000, 1, "n", ["a"], 2)[0]),
        "generator seeds": SampleDraws([1], ["a"]).generator_seeds(".step"),
        "keys": [make_key("test", "a/ b", 1, 0), make_key("my split", "7", 1, 0)],
        "key order": str(key_order_hash("a", 1)),
        "limit": {rule: ranks(rule) for rule in ("hash", "reservoir", "first")},
        "shards": shard_of_each(scratch / "rows"),
        "data order": [DataOrder((5, 7), 1).epoch(1).tolist(), blocked_order()],
        "validation": choose_instances(9, 4, 1).tolist(),
        "negatives": choose_negatives("a", 1, 9, 4).tolist(),
        "other dialogs": derangement(KEYS),
        "resampling": bca(np.arange(12.0) ** 2, np.arange(12)),
        "hosts": spread(),
        "rate limiter of a host": [limiter_of(f"{number}.org") for number in range(6)],
        "names of files": [
            str(tar_index.name_hash("a.jpg")),
            storage.cache_directory("s3://b/c").name,
        ],
        "dialogs without an id": dialogs_without_id(scratch / "chats"),
        "shapes": shapes_hash({"a": (1, 2)}),
        "fingerprint": fingerprint_sha256({"image": {"a": 1}}),
        "demo": demo_hashes(scratch / "demo"),
    }


def drawn(purpose: str) -> float:
    return float(normal(1, purpose, ["test-0-1-0"], 2, (1,))[0, 0])


def ranks(rule: Any) -> list[str]:
    return [str(rank) for rank in SmallestRankSampler(1, rule, seed=1).rank(instances())]


def instances() -> list[Instance]:
    return [
        Instance(key, "test", key[5:-4], 0, 0, (), ImageRef("file", (f"{key}.jpg",)))
        for key in KEYS
    ]


def shard_of_each(directory: Path) -> list[list[str]]:
    directory.mkdir()
    with ShardAssigner(directory) as grouped:
        grouped.add(instances(), np.zeros(len(KEYS), np.uint64))
    return [table.column("key").to_pylist() for table in grouped.shards(2**64 - 1, 4)]


def blocked_order() -> list[int]:
    order = DataOrder((2, 3, 4), 1, "blocked", 2)
    return [int(index) for index in order.epoch(0)]


def spread() -> list[str]:
    urls = [f"https://{host}.org/{number}.jpg" for host in "abc" for number in range(2)]
    return [ref.value[0] for ref in interleave_by_host(ImageRef("urls", (url,)) for url in urls)]


def limiter_of(host: str) -> int:
    shared: tuple[SharedActor[Any], ...] = tuple(
        SharedActor(number, is_remote=False) for number in range(4)
    )
    return shared.index(ShardedRateLimiter(shared, 0).of(host))


def dialogs_without_id(directory: Path) -> list[str]:
    directory.mkdir()
    turns = [{"text": "hello", "speaker": "ann"}, {"images": ["a.jpg"]}]
    (directory / "test.jsonl").write_text(json.dumps({"turns": turns}) + "\n")
    return [instance.key for instance in read_instances("jsonl", str(directory), "test")]


def demo_hashes(directory: Path) -> dict[str, str]:
    write_corpus(directory, 20, 1)
    scenes = all_scenes()
    files = sorted(path for path in directory.rglob("*") if path.suffix in {".json", ".jsonl"})
    return {
        "dialogs": sha256(b"".join(path.read_bytes() for path in files)),
        "names": sha256("".join(sorted(path.name for path in directory.rglob("*"))).encode()),
        "held out": str(sum(number for number, scene in enumerate(scenes) if is_held_out(scene))),
        "image": sha256(render_scene(scenes[7], 3).tobytes()),
    }


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
