"""A shard writer made only from docs/format.md, without code of d2i.

Only the test at the end compares it with d2i.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from d2i.shards import Sample, ShardReader, verify, write_manifest, write_shard

IMAGES = ["jpg", "png", "webp", "gif"]


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


@dataclass(frozen=True)
class Format:
    """A format, an example of its arrays, and the features of the empty text."""

    version: int
    arrays: dict[str, dict[str, Any]]
    fingerprint: dict[str, Any]
    empty: dict[str, bytes]

    @property
    def suffixes(self) -> list[str]:
        return ["json", *(f"{name}.npy" for name in self.arrays), *IMAGES]

    def members(self, number: int) -> dict[str, bytes]:
        random = np.random.default_rng(number)
        text = json.dumps(metadata(number), sort_keys=True, separators=(",", ":"))
        arrays = {
            f"{name}.npy": npy(example(random, array["dtype"], array["shape"]))
            for name, array in self.arrays.items()
        }
        return {"json": text.encode("ascii"), **arrays, "png": b"any bytes" + bytes([number])}


def example(random: np.random.Generator, dtype: str, shape: list[int]) -> NDArray[Any]:
    if dtype == "float16":
        return random.normal(size=shape).astype("<f2")
    if dtype == "bfloat16":
        # The upper half of a float32.
        return (random.normal(size=shape).astype("<f4").view("<u4") >> 16).astype("<u2")
    return random.integers(0, {"uint16": 49408, "uint32": 1 << 32}[dtype], shape).astype(
        {"uint16": "<u2", "uint32": "<u4"}[dtype]
    )


FORMAT_1 = Format(
    1,
    {
        "moments": {"dtype": "float16", "shape": [8, 4, 4]},
        "clip": {"dtype": "float16", "shape": [16]},
        "tokens": {"dtype": "uint16", "shape": [77]},
        "text": {"dtype": "float16", "shape": [77, 6]},
    },
    {"image": {"resolution": 32}, "text": {"num_windows": 1}},
    {
        "empty_tokens.npy": npy(np.zeros(77, "<u2")),
        "empty_text.npy": npy(np.zeros((77, 6), "<f2")),
    },
)
DECLARED = {
    "ids": {"dtype": "uint32", "encoder": "tokenizer", "shape": [5]},
    "latent_2": {"dtype": "bfloat16", "encoder": "vae", "shape": [32, 4, 4]},
    "mask": {"dtype": "uint16", "encoder": "tokenizer", "shape": [5]},
    "moments": {"dtype": "float16", "encoder": "vae", "shape": [32, 4, 4]},
}
WEIGHTS = {"vae": {"sha256": "ab" * 32}, "tokenizer": {"sha256": "cd" * 32}}
FORMAT_2 = Format(
    2, DECLARED, {"format": 2, "arrays": DECLARED, "encoders": WEIGHTS, "image": {"side": 4}}, {}
)
BOTH = pytest.mark.parametrize("kind", [FORMAT_1, FORMAT_2], ids=["format 1", "format 2"])


def write(directory: Path, kind: Format, shards: list[dict[str, dict[str, bytes]]]) -> None:
    """Write a data set as the page describes."""
    commits = [write_one(directory, kind, index, samples) for index, samples in enumerate(shards)]
    for name, data in kind.empty.items():
        (directory / name).write_bytes(data)
    files = {"files": {name: info(data) for name, data in kind.empty.items()}}
    manifest = canonical(
        {
            "format": kind.version,
            "fingerprint": kind.fingerprint,
            "num_samples": sum(commit["num_samples"] for commit in commits),
            "size_bytes": sum(commit["tar"]["size_bytes"] for commit in commits),
            "failures": {"timeout": 2 * len(commits)},
            "arrays": kind.arrays,
            "shards": commits,
        }
        | (files if kind.version == 1 else {})
    )
    (directory / "manifest.json.sha256").write_text(f"{sha256(manifest)}  manifest.json\n")
    (directory / "manifest.json").write_bytes(manifest)


def write_one(
    directory: Path, kind: Format, index: int, samples: dict[str, dict[str, bytes]]
) -> dict[str, Any]:
    tar, rows = bytearray(), []
    for key, parts in samples.items():
        row: dict[str, Any] = {"key": key}
        for suffix in kind.suffixes:
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
    index_file = arrow(rows, kind.suffixes)
    commit = {
        "format": kind.version,
        "name": name,
        "index": index,
        "num_samples": len(rows),
        "failures": {"timeout": 2},
        "fingerprint_sha256": sha256(canonical(kind.fingerprint)),
        "tar": info(bytes(tar)),
        "index_file": info(index_file),
        "arrays": kind.arrays if rows or kind.version == 2 else {},
    }
    (directory / f"{name}.tar").write_bytes(tar)
    (directory / f"{name}.arrow").write_bytes(index_file)
    (directory / f"{name}.commit.json").write_bytes(canonical(commit))
    return commit


def arrow(rows: list[dict[str, Any]], suffixes: list[str]) -> bytes:
    kinds = {"offset": pa.uint64(), "size": pa.uint64(), "crc32": pa.uint32()}
    fields = [pa.field("key", pa.string(), nullable=False)]
    for suffix in suffixes:
        fields += [pa.field(f"{suffix}.{n}", kind, nullable=False) for n, kind in kinds.items()]
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, pa.schema(fields)) as file:
        file.write_batch(pa.RecordBatch.from_pylist(rows, schema=pa.schema(fields)))
    return sink.getvalue()


@BOTH
def test_writer_from_format_page_matches_d2i_bytes(tmp_path: Path, kind: Format) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for directory in (ours, theirs):
        directory.mkdir()
    # One shard has no sample.
    shards = [{f"train-{n}-0-0": kind.members(n) for n in part} for part in ((0, 1, 2), (), (3, 4))]
    write(ours, kind, shards)
    assert verify(str(ours)).problems == ()
    reader = ShardReader(str(ours), kind.fingerprint)
    for name in kind.arrays:
        found = reader.read([4, 0], [name])[name]
        assert [npy(row) for row in found] == [kind.members(n)[f"{name}.npy"] for n in (4, 0)]
    for index, part in enumerate(shards):
        samples = [Sample(key, parts) for key, parts in part.items()]
        write_shard(
            samples, str(theirs), index, failures={"timeout": 2}, fingerprint=kind.fingerprint
        )
    for name in kind.empty:
        (theirs / name).write_bytes((ours / name).read_bytes())
    write_manifest(str(theirs), kind.fingerprint)
    assert {path.name: path.read_bytes() for path in theirs.iterdir()} == {
        path.name: path.read_bytes() for path in ours.iterdir()
    }
