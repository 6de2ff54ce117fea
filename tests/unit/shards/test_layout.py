"""Format 2: shards hold the arrays that their fingerprint declares, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2i.errors import ShardError
from d2i.shards import (
    Sample,
    ShardReader,
    json_bytes,
    npy_bytes,
    read_commits,
    read_manifest,
    rebuild_commit,
    restore,
    verify,
    write_manifest,
    write_shard,
)
from d2i.shards.commit import canonical_json
from d2i.shards.sample import npy_header
from d2i.shards.writer import file_info
from tests.damage import flipped_bit
from tests.samples import metadata

DECLARED: dict[str, dict[str, Any]] = {
    "moments": {"dtype": "float16", "shape": [32, 2, 2], "encoder": "vae"},
    "pooled": {"dtype": "bfloat16", "shape": [6], "encoder": "clip"},
    "ids": {"dtype": "uint32", "shape": [7], "encoder": "tokenizer"},
    "mask": {"dtype": "uint16", "shape": [7], "encoder": "tokenizer"},
}
ENCODERS = {name: {"sha256": f"{n}" * 64} for n, name in enumerate(("vae", "clip", "tokenizer"))}
FINGERPRINT = {"format": 2, "arrays": DECLARED, "encoders": ENCODERS, "image": {"side": 2}}


def declaring(**arrays: Any) -> dict[str, Any]:
    return {**FINGERPRINT, "arrays": {**DECLARED, **arrays}}


def make_arrays(number: int) -> dict[str, Any]:
    random = np.random.default_rng(number)
    return {
        "moments": random.normal(size=(32, 2, 2)).astype(np.float16),
        "pooled": (random.normal(size=6).astype(np.float32).view(np.uint32) >> 16).astype(
            np.uint16
        ),
        "ids": random.integers(0, 1 << 32, 7).astype(np.uint32),
        "mask": random.integers(0, 2, 7).astype(np.uint16),
    }


def make_sample(number: int, **changes: Any) -> Sample:
    key = f"train-{number}-0-0"
    arrays = {**make_arrays(number), **changes}
    members = {f"{name}.npy": npy_bytes(a) for name, a in arrays.items() if a is not None}
    return Sample(key, {"json": json_bytes(metadata(key)), "jpg": b"image", **members})


def make_data(directory: Path, *counts: int) -> None:
    for index, count in enumerate(counts):
        samples = [make_sample(10 * index + number) for number in range(count)]
        write_shard(samples, str(directory), index, failures={}, fingerprint=FINGERPRINT)
    write_manifest(str(directory), FINGERPRINT)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    make_data(tmp_path, 2, 0, 1)
    return tmp_path


def test_arrays_are_read_as_declared(data: Path) -> None:
    reader = ShardReader(str(data), FINGERPRINT)
    expected = [make_arrays(number) for number in (20, 0, 1)]
    batch = reader.read([2, 0, 1])
    assert {name: array.dtype.name for name, array in batch.items()} == {
        "moments": "float16",
        "pooled": "uint16",
        "ids": "uint32",
        "mask": "uint16",
    }
    for name, array in batch.items():
        np.testing.assert_array_equal(array, np.stack([arrays[name] for arrays in expected]))
    manifest = read_manifest(str(data))
    assert manifest.arrays["pooled"].model_dump(mode="json") == DECLARED["pooled"]
    assert manifest.format == 2
    assert all(commit.arrays == manifest.arrays for commit in read_commits(str(data)))
    assert b'"files"' not in (data / "manifest.json").read_bytes()
    assert verify(str(data)).ok
    with pytest.raises(ShardError, match="holds no empty_text"):
        _ = reader.empty_text


BAD_ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "absent": ({"ids": None}, "lacks ids, which the data set declares"),
    "another": ({"clip": np.zeros(3, np.float16)}, r"suffix 'clip\.npy'"),
    "shape": ({"mask": np.zeros(8, np.uint16)}, r"mask is not npy uint16 \(7,\)"),
    "dtype": ({"ids": np.zeros(7, np.uint16)}, r"ids is not npy uint32 \(7,\)"),
    "infinite bfloat16": ({"pooled": np.full(6, 0x7F80, np.uint16)}, "pooled holds a value"),
    "bfloat16 that is no number": ({"pooled": np.full(6, 0xFFC0, np.uint16)}, "pooled holds"),
    "infinite float16": ({"moments": np.full((32, 2, 2), np.inf, np.float16)}, "moments holds"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_sample_unlike_declaration_leaves_no_file(case: str, tmp_path: Path) -> None:
    changes, message = BAD_ARRAYS[case]
    with pytest.raises(ShardError, match=f"sample train-1-0-0: .*{message}"):
        write_shard(
            [make_sample(0), make_sample(1, **changes)],
            *(str(tmp_path), 0),
            failures={},
            fingerprint=FINGERPRINT,
        )
    assert list(tmp_path.iterdir()) == []


def array(**changes: Any) -> dict[str, Any]:
    return {"dtype": "float16", "shape": [2], "encoder": "vae", **changes}


BAD_FINGERPRINTS: dict[str, tuple[dict[str, Any], str]] = {
    "no arrays": ({"format": 2}, "does not declare its arrays"),
    "arrays as a list": ({**FINGERPRINT, "arrays": []}, "does not declare its arrays"),
    "no encoder": (declaring(x={"dtype": "float16", "shape": [2]}), "Field required"),
    "unknown encoder": (declaring(x=array(encoder="t5")), "no sha256 of 't5'"),
    "no encoders": ({**FINGERPRINT, "encoders": None}, "no sha256 of 'vae'"),
    "weights without a hash": (
        {**FINGERPRINT, "encoders": {**ENCODERS, "vae": {"sha256": ""}}},
        "no sha256 of 'vae'",
    ),
    "encoder without weights": ({**FINGERPRINT, "encoders": {**ENCODERS, "vae": {}}}, "'vae'"),
    "more fields": (declaring(x=array(scale=2)), "Extra inputs"),
    "name of an image": (declaring(png=array()), "array 'png'"),
    "name of the json": (declaring(json=array()), "array 'json'"),
    "long name": (declaring(a2345678901234567=array()), "array 'a2345678901234567'"),
    "capitals": (declaring(Text=array()), "array 'Text'"),
    "path": (declaring(**{"../x": array()}), "array '../x'"),
    "dtype": (declaring(x=array(dtype="float32")), "dtype float32 is not supported"),
    "no axes": (declaring(x=array(shape=[])), "array x has no axes"),
    "empty axis": (declaring(x=array(shape=[2, 0])), "greater than or equal to 1"),
    "shape of text": (declaring(x=array(shape=["2"])), "valid integer"),
    "too large": (declaring(x=array(shape=[1 << 28])), "more than 268435456 bytes"),
    "many axes": (declaring(x=array(shape=[1] * 40)), "does not fit an npy header"),
}


@pytest.mark.parametrize("case", BAD_FINGERPRINTS)
def test_invalid_declaration_is_rejected(case: str, data: Path) -> None:
    fingerprint, message = BAD_FINGERPRINTS[case]
    with pytest.raises(ShardError, match=message):
        write_shard([], str(data), 9, failures={}, fingerprint=fingerprint)
    values = json.loads((data / "manifest.json").read_bytes()) | {"fingerprint": fingerprint}
    write_forged(data, values)
    with pytest.raises(ShardError, match=r"manifest\.json is not a Manifest"):
        read_manifest(str(data))


def write_forged(directory: Path, values: Mapping[str, Any]) -> None:
    content = (json.dumps(values, sort_keys=True, indent=1) + "\n").encode()
    (directory / "manifest.json").write_bytes(content)
    (directory / "manifest.json.sha256").write_text(f"{file_info(content).sha256}  manifest.json\n")


CHANGES: dict[str, dict[str, Any]] = {
    "a fingerprint of format 1": {"fingerprint": {"image": {}}},
    "a fingerprint of no version": {"fingerprint": {**FINGERPRINT, "format": 2.0}},
    "format": {"format": 1},
    "an array": {"arrays": {**DECLARED, "moments": array(shape=[8, 2, 2])}},
    "no array": {"arrays": {}},
    "files": {"files": {}},
}


@pytest.mark.parametrize("case", CHANGES)
def test_manifest_unlike_its_fingerprint_is_rejected(case: str, data: Path) -> None:
    values = json.loads((data / "manifest.json").read_bytes())
    write_forged(data, values | CHANGES[case])
    with pytest.raises(ShardError):
        read_manifest(str(data))


@pytest.mark.parametrize("version", [1, 2])
def test_manifest_without_shards_has_the_format_of_its_fingerprint(
    version: int, tmp_path: Path
) -> None:
    write_manifest(str(tmp_path), FINGERPRINT if version == 2 else {})
    assert read_manifest(str(tmp_path)).format == version
    values = json.loads((tmp_path / "manifest.json").read_bytes())
    for changed in ({"format": 3 - version}, {"fingerprint": {} if version == 2 else FINGERPRINT}):
        write_forged(tmp_path, values | changed)
        with pytest.raises(ShardError, match=r"manifest\.json is not a Manifest"):
            read_manifest(str(tmp_path))


def test_number_without_json_form_is_one_line_error(data: Path) -> None:
    values = json.loads((data / "manifest.json").read_bytes())
    values["fingerprint"]["image"] = {"side": float("nan")}
    write_forged(data, values)
    with pytest.raises(ShardError, match=r"manifest\.json is not a Manifest"):
        read_manifest(str(data))


def test_record_without_fingerprint_is_rejected(data: Path) -> None:
    (path, *_) = sorted(data.glob("*.commit.json"))
    values = json.loads(path.read_bytes()) | {"fingerprint_sha256": None}
    path.write_bytes(canonical_json(values))
    with pytest.raises(ShardError, match="in format 2 it has the fingerprint_sha256"):
        read_commits(str(data))


def test_shards_of_both_formats_are_not_merged(data: Path) -> None:
    first = {"moments": np.zeros((8, 2, 2), np.float16), "pooled": None, "ids": None, "mask": None}
    write_shard([make_sample(7, **first)], str(data), 5, failures={})
    with pytest.raises(ShardError, match="has format 1; expected 2"):
        write_manifest(str(data), FINGERPRINT)


def test_long_name_of_array_needs_short_key(tmp_path: Path) -> None:
    fingerprint = {**FINGERPRINT, "arrays": {"a234567890123456": array()}}
    members = {"a234567890123456.npy": npy_bytes(np.zeros(2, np.float16))}
    for key, fits in (("k" * 79, True), ("k" * 80, False)):
        sample = Sample(key, {"json": json_bytes(metadata(key)), **members})
        if fits:
            write_shard([sample], str(tmp_path), 0, failures={}, fingerprint=fingerprint)
        else:
            with pytest.raises(ShardError, match="a name of 101 characters"):
                write_shard([sample], str(tmp_path), 1, failures={}, fingerprint=fingerprint)
    write_manifest(str(tmp_path), fingerprint)
    assert verify(str(tmp_path)).ok


def test_bfloat16_and_its_bits_are_told_apart_by_declaration_alone(tmp_path: Path) -> None:
    """Their bytes are equal, so a record that says otherwise is what differs."""
    assert npy_header("bfloat16", (2,)) == npy_header("uint16", (2,))
    make_data(tmp_path, 1)
    values = json.loads((tmp_path / "manifest.json").read_bytes())
    values["arrays"]["pooled"]["dtype"] = "uint16"
    write_forged(tmp_path, values)
    with pytest.raises(ShardError, match="totals do not match"):
        read_manifest(str(tmp_path))


def test_lost_index_and_record_are_rebuilt_from_tar(data: Path) -> None:
    before = {path.name: path.read_bytes() for path in data.iterdir()}
    first, empty, last = read_commits(str(data))
    for name in (first.index_name, first.commit_name, empty.index_name, last.index_name):
        (data / name).unlink()
    restore(str(data), [first, empty, last], FINGERPRINT)
    (data / last.commit_name).unlink()
    rebuilt = rebuild_commit(str(data), last.tar_name, failures={}, fingerprint=FINGERPRINT)
    assert rebuilt == last
    assert {path.name: path.read_bytes() for path in data.iterdir()} == before


@settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(pick=st.integers(0), bit=st.integers(0))
def test_every_flipped_bit_is_found_and_never_read(data: Path, pick: int, bit: int) -> None:
    expected = ShardReader(str(data)).read([0, 1, 2])
    with flipped_bit(data, pick, bit) as path:
        assert any(p.file in (path.name, "manifest.json") for p in verify(str(data)).problems)
        with suppress(ShardError):
            batch = ShardReader(str(data)).read([0, 1, 2])
            assert all(np.array_equal(batch[name], expected[name]) for name in expected)
