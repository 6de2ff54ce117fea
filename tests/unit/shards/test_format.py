"""A shard writer made only from docs/format.md, without code of d2i.

Only the test at the end compares it with d2i.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from d2i.shards import Sample, ShardReader, verify, write_manifest, write_shard

NPY_SUFFIXES = [f"{name}.npy" for name in ("moments", "clip", "tokens", "text")]
SUFFIXES = ["json", *NPY_SUFFIXES, "jpg", "png", "webp", "gif"]
FINGERPRINT = {"image": {"resolution": 32}, "text": {"num_windows": 1}}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def info(data: bytes) -> dict[str, Any]:
    return {"size_bytes": len(data), "sha256": sha256(data)}


def canonical(value: Any) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode("ascii")


def npy(array: NDArray[Any]) -> bytes:
    text = f"{{'descr': '{array.dtype.str}', 'fortran_order': False, 'shape': {array.shape}, }}"
    return b"\x93NUMPY\x01\x00\x76\x00" + text.encode().ljust(117) + b"\n" + array.tobytes()


def metadata(number: int) -> dict[str, Any]:
    source = {"ref": ["a.png"], "sha256": "0" * 64, "size_bytes": 10, "width": 4, "height": 4}
    return {
        "key": f"train-{number}-0-0",
        "split": "train",
        "dialog_id": str(number),
        "turn": 2,
        "image": 0,
        "context": [{"speaker": 0, "text": "naïve"}, {"speaker": None, "text": ""}],
        "direction": "answer",
        "description": None,
        "labels": ["ball"],
        "description_by": None,
        "source": source,
    }


def members(number: int) -> dict[str, bytes]:
    random = np.random.default_rng(number)
    return {
        "json": json.dumps(metadata(number), sort_keys=True, separators=(",", ":")).encode("ascii"),
        "moments.npy": npy(random.normal(size=(8, 4, 4)).astype("<f2")),
        "clip.npy": npy(random.normal(size=16).astype("<f2")),
        "tokens.npy": npy(random.integers(0, 49408, 77).astype("<u2")),
        "text.npy": npy(random.normal(size=(77, 6)).astype("<f2")),
        "png": b"any bytes" + bytes([number]),
    }


ARRAYS = {
    "moments": {"dtype": "float16", "shape": [8, 4, 4]},
    "clip": {"dtype": "float16", "shape": [16]},
    "tokens": {"dtype": "uint16", "shape": [77]},
    "text": {"dtype": "float16", "shape": [77, 6]},
}


def write(directory: Path, shards: list[dict[str, dict[str, bytes]]]) -> None:
    """Write a data set as the page describes."""
    commits = [write_one(directory, index, samples) for index, samples in enumerate(shards)]
    empty = {"empty_tokens.npy": npy(np.zeros(77, "<u2"))}
    empty["empty_text.npy"] = npy(np.zeros((77, 6), "<f2"))
    for name, data in empty.items():
        (directory / name).write_bytes(data)
    manifest = canonical(
        {
            "format": 1,
            "fingerprint": FINGERPRINT,
            "num_samples": sum(commit["num_samples"] for commit in commits),
            "size_bytes": sum(commit["tar"]["size_bytes"] for commit in commits),
            "failures": {"timeout": 2 * len(commits)},
            "arrays": ARRAYS,
            "files": {name: info(data) for name, data in empty.items()},
            "shards": commits,
        }
    )
    (directory / "manifest.json.sha256").write_text(f"{sha256(manifest)}  manifest.json\n")
    (directory / "manifest.json").write_bytes(manifest)


def write_one(directory: Path, index: int, samples: dict[str, dict[str, bytes]]) -> dict[str, Any]:
    tar, rows = bytearray(), []
    for key, parts in samples.items():
        row: dict[str, Any] = {"key": key}
        for suffix in SUFFIXES:
            data = parts.get(suffix)
            if data is not None:
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size, member.mode = len(data), 0o644
                tar += member.tobuf(tarfile.USTAR_FORMAT)
            row[f"{suffix}.offset"] = len(tar) if data is not None else 0
            row[f"{suffix}.size"] = len(data or b"")
            row[f"{suffix}.crc32"] = zlib.crc32(data) if data is not None else 0
            tar += (data or b"") + bytes(-len(data or b"") % 512)
        rows.append(row)
    tar += bytes(1024)
    name = f"{index:06d}-{sha256(bytes(tar))[:16]}"
    index_file = arrow(rows)
    commit = {
        "format": 1,
        "name": name,
        "index": index,
        "num_samples": len(rows),
        "failures": {"timeout": 2},
        "fingerprint_sha256": sha256(canonical(FINGERPRINT)),
        "tar": info(bytes(tar)),
        "index_file": info(index_file),
        "arrays": ARRAYS,
    }
    (directory / f"{name}.tar").write_bytes(tar)
    (directory / f"{name}.arrow").write_bytes(index_file)
    (directory / f"{name}.commit.json").write_bytes(canonical(commit))
    return commit


def arrow(rows: list[dict[str, Any]]) -> bytes:
    kinds = {"offset": pa.uint64(), "size": pa.uint64(), "crc32": pa.uint32()}
    fields = [pa.field("key", pa.string(), nullable=False)]
    for suffix in SUFFIXES:
        fields += [pa.field(f"{suffix}.{n}", kind, nullable=False) for n, kind in kinds.items()]
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, pa.schema(fields)) as file:
        file.write_batch(pa.RecordBatch.from_pylist(rows, schema=pa.schema(fields)))
    return sink.getvalue()


@pytest.fixture
def shards() -> list[dict[str, dict[str, bytes]]]:
    return [{f"train-{n}-0-0": members(n) for n in part} for part in ((0, 1, 2), (3, 4))]


def test_writer_from_format_page_matches_d2i_bytes(
    tmp_path: Path, shards: list[dict[str, dict[str, bytes]]]
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for directory in (ours, theirs):
        directory.mkdir()
    write(ours, shards)
    assert verify(str(ours)).problems == ()
    clip = ShardReader(str(ours), FINGERPRINT).read([4, 0], ["clip"])["clip"]
    assert [npy(row) for row in clip] == [members(n)["clip.npy"] for n in (4, 0)]
    for index, part in enumerate(shards):
        samples = [Sample(key, parts) for key, parts in part.items()]
        write_shard(samples, str(theirs), index, failures={"timeout": 2}, fingerprint=FINGERPRINT)
    for name in ("empty_tokens.npy", "empty_text.npy"):
        (theirs / name).write_bytes((ours / name).read_bytes())
    write_manifest(str(theirs), FINGERPRINT)
    assert {path.name: path.read_bytes() for path in theirs.iterdir()} == {
        path.name: path.read_bytes() for path in ours.iterdir()
    }
