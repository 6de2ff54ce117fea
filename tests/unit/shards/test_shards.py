"""Shards: deterministic bytes, reads in any order, all damage found, no input trusted."""

from __future__ import annotations

import gc
import io
import json
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2i.errors import ShardError
from d2i.fault_injection import Fault, FaultError, Point
from d2i.io import storage
from d2i.shards import (
    Manifest,
    Sample,
    ShardReader,
    json_bytes,
    npy_array,
    npy_bytes,
    read_commits,
    read_manifest,
    remove_uncommitted,
    verify,
    write_manifest,
    write_shard,
)
from d2i.shards.commit import canonical_json, shard_name
from d2i.shards.index import Extent, Index, IndexRow, index_bytes, read_index
from d2i.shards.layout import FORMAT_1
from d2i.shards.sample import npy_header
from d2i.shards.writer import file_info
from tests.damage import flipped_bit
from tests.samples import metadata

FINGERPRINT = {"image": {"vae": "ab12", "resolution": 32}, "text": {"num_windows": 1}}
JPEG = b"\xff\xd8\xff\xe0 not decoded here"


def make_sample(number: int, *, image: str | None = "jpg", seed: int = 0) -> Sample:
    """Make a small sample of random arrays without NaN."""
    random = np.random.default_rng((seed, number))
    key = f"train-{number}-0-0"
    members = {
        "json": json_bytes(metadata(key, dialog_id=str(number), description="naïve 🙂")),
        "moments.npy": npy_bytes(random.normal(size=(8, 4, 4)).astype(np.float16)),
        "clip.npy": npy_bytes(random.normal(size=16).astype(np.float16)),
        "tokens.npy": npy_bytes(random.integers(0, 49408, 77).astype(np.uint16)),
        "text.npy": npy_bytes(random.normal(size=(77, 6)).astype(np.float16)),
    }
    if image is not None:
        members[image] = JPEG + bytes([number % 256])
    return Sample(key, members)


def make_data(directory: Path, *counts: int) -> Manifest:
    """Write a data set of one shard for each count of samples."""
    first = np.cumsum([0, *counts])
    for index, count in enumerate(counts):
        samples = [make_sample(int(first[index]) + number) for number in range(count)]
        write_shard(
            samples, str(directory), index, failures={"timeout": 2}, fingerprint=FINGERPRINT
        )
    for name, array in (
        ("tokens", np.full(77, 49407, np.uint16)),
        ("text", np.ones((77, 6), np.float16)),
    ):
        storage.write_bytes(str(directory / f"empty_{name}.npy"), npy_bytes(array))
    return write_manifest(str(directory), FINGERPRINT)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def reasons(directory: Path) -> set[tuple[str, str]]:
    return {(Path(p.file).suffix, p.reason) for p in verify(str(directory)).problems}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    make_data(directory, 3, 0, 4, 1)
    return directory


@pytest.fixture
def copy(data: Path, tmp_path: Path) -> Path:
    for name, content in contents(data).items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
    dtype=st.sampled_from([np.float16, np.uint16]),
)
def test_npy_bytes_round_trip_and_load_in_numpy(shape: tuple[int, ...], dtype: Any) -> None:
    array: Any = np.random.default_rng(0).integers(0, 2000, shape).astype(dtype)
    encoded = npy_bytes(array)
    assert len(encoded) == 128 + array.nbytes
    assert encoded == npy_bytes(np.asfortranarray(array))
    for decoded in (npy_array(encoded), np.load(io.BytesIO(encoded), allow_pickle=False)):
        assert decoded.dtype == array.dtype
        np.testing.assert_array_equal(decoded, array)


@given(st.binary(max_size=300), st.integers(0, 127), st.integers(1, 255))
def test_npy_array_rejects_corrupted_bytes(junk: bytes, position: int, flip: int) -> None:
    good = bytearray(npy_bytes(np.zeros((2, 3), np.float16)))
    good[position] ^= flip
    for hostile in (junk, bytes(good)):
        with pytest.raises(ShardError):
            npy_array(hostile)


def test_npy_rejects_pickle_and_other_dtypes() -> None:
    pickled = io.BytesIO()
    np.save(pickled, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ShardError):
        npy_array(pickled.getvalue())
    with pytest.raises(ShardError, match="float32"):
        npy_bytes(np.zeros(3, np.float32))


BAD_MEMBERS: dict[str, tuple[str, bytes | None]] = {
    "no json": ("json", None),
    "json list": ("json", b"[]"),
    "deep json": ("json", b"[" * 100_000),
    "json with NaN": ("json", b'{"a":NaN}'),
    "json of two lines": ("json", b'{"a":1}\n'),
    "json with a key twice": ("json", b'{"a":1,"a":2}'),
    "infinite": ("text.npy", npy_bytes(np.full((77, 6), np.inf, np.float16))),
    "not a number": ("clip.npy", npy_bytes(np.full(16, -np.nan, np.float16))),
    "unknown token": ("tokens.npy", npy_bytes(np.full(77, 49408, np.uint16))),
    "pickle": ("pickle", b"x"),
    "two images": ("png", b"x"),
    "empty": ("jpg", b""),
    "moments channels": ("moments.npy", npy_bytes(np.zeros((4, 4, 4), np.float16))),
    "moments rank": ("moments.npy", npy_bytes(np.zeros((8, 4), np.float16))),
    "tokens dtype": ("tokens.npy", npy_bytes(np.zeros(77, np.float16))),
    "tokens window": ("tokens.npy", npy_bytes(np.zeros(76, np.uint16))),
    "axis of size 0": ("clip.npy", npy_header("float16", (0,))),
    "other windows": ("tokens.npy", npy_bytes(np.zeros(154, np.uint16))),
    "other shape": ("clip.npy", npy_bytes(np.zeros(17, np.float16))),
    "absent array": ("clip.npy", None),
}


@pytest.mark.parametrize("name", BAD_MEMBERS)
def test_invalid_sample_leaves_no_file(name: str, tmp_path: Path) -> None:
    suffix, content = BAD_MEMBERS[name]
    good, bad = make_sample(0), make_sample(1)
    members = {key: value for key, value in bad.members.items() if key != suffix}
    if content is not None:
        members[suffix] = content
    with pytest.raises(ShardError, match=bad.key):
        write_shard([good, Sample(bad.key, members)], str(tmp_path), 0, failures={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["", "-1", "a.b", "a/b", "..", "a" * 89, "ü", "a\n"])
def test_invalid_key_leaves_no_file(key: str, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="tar member"):
        write_shard([Sample(key, make_sample(0).members)], str(tmp_path), 0, failures={})
    assert list(tmp_path.iterdir()) == []


def test_duplicate_key_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="twice"):
        write_shard([make_sample(0), make_sample(0)], str(tmp_path), 0, failures={})
    assert list(tmp_path.iterdir()) == []


def test_shard_bytes_are_independent_of_write_order(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    make_data(one, 2, 3)
    for index, numbers in ((1, (2, 3, 4)), (0, (0, 1))):
        samples = (make_sample(number) for number in numbers)
        write_shard(samples, f"file://{two}", index, failures={"timeout": 2, "none": 0})
    for path in one.glob("empty_*"):
        storage.write_bytes(str(two / path.name), path.read_bytes())
    write_manifest(f"file://{two}", dict(reversed(FINGERPRINT.items())))
    tars = {name for name in contents(one) if name.endswith((".tar", ".arrow"))}
    assert {name: contents(two)[name] for name in tars} == {
        name: contents(one)[name] for name in tars
    }


def test_write_manifest_does_not_rewrite_finished_data(copy: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in copy.iterdir()}
    write_manifest(str(copy), FINGERPRINT)
    assert {path.name: path.stat().st_mtime_ns for path in copy.iterdir()} == before


def test_tar_headers_match_tarfile(data: Path) -> None:
    for path in data.glob("*.tar"):
        with tarfile.open(path, "r:") as file:
            members = file.getmembers()
        assert all(
            m.isreg() and (m.uid, m.gid, m.mtime, m.mode) == (0, 0, 0, 0o644) for m in members
        )
        ours = path.read_bytes()
        for member in members:
            theirs = tarfile.TarInfo(member.name)
            theirs.size = member.size
            block = theirs.tobuf(tarfile.USTAR_FORMAT)
            header = ours[member.offset : member.offset + 512]
            # Versions of Python differ in the device numbers (329:345) of a file, so in the sum.
            assert header[:148] + header[156:329] == block[:148] + block[156:329]
            assert not any(header[329:])


def test_webdataset_reads_same_samples(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WDS_SECURE", "1")
    wds = pytest.importorskip("webdataset")
    reader = ShardReader(str(data))
    urls = [str(path) for path in sorted(data.glob("*.tar")) if path.stat().st_size > 1024]
    theirs = list(wds.WebDataset(urls, shardshuffle=False, empty_check=False).decode())
    assert [sample["__key__"] for sample in theirs] == list(reader.keys)
    for position, sample in enumerate(theirs):
        assert sample["json"] == reader.read_json(position)
        assert sample["jpg"] == reader.read_image(position)
        for name, array in reader.read([position]).items():
            np.testing.assert_array_equal(sample[f"{name}.npy"], array[0])


def test_manifest_merges_commits(data: Path) -> None:
    manifest = read_manifest(str(data))
    assert [shard.num_samples for shard in manifest.shards] == [3, 0, 4, 1]
    assert manifest.shards == tuple(read_commits(str(data)))
    assert (manifest.num_samples, manifest.failures) == (8, {"timeout": 8})
    assert manifest.arrays["moments"].shape == (8, 4, 4)
    assert sorted(manifest.files) == ["empty_text.npy", "empty_tokens.npy"]
    assert manifest.sha256 == (data / "manifest.json.sha256").read_text().split()[0]
    line = ["sha256sum", "--check", "--quiet", "manifest.json.sha256"]
    assert subprocess.run(line, cwd=data, check=False).returncode == 0


@pytest.mark.parametrize("counts", [(), (1,), (2, 0, 1)])
def test_streamed_manifest_is_canonical_json(counts: tuple[int, ...], tmp_path: Path) -> None:
    fingerprint = {"a": '"shards": []\n', "z": [[], {"shards": []}]}
    for index, count in enumerate(counts):
        samples = [make_sample(10 * index + number) for number in range(count)]
        write_shard(samples, str(tmp_path), index, failures={}, fingerprint=fingerprint)
    manifest = write_manifest(str(tmp_path), fingerprint)
    assert manifest.to_bytes() == canonical_json(manifest.model_dump(mode="json"))
    assert read_manifest(str(tmp_path)) == manifest


def test_supplement_subtracts_failures(copy: Path) -> None:
    failures_delta = {"timeout": -2, "http": 1}
    write_shard([make_sample(99)], str(copy), 4, failures=failures_delta, fingerprint=FINGERPRINT)
    assert write_manifest(str(copy), FINGERPRINT).failures == {"timeout": 6, "http": 1}
    assert verify(str(copy)).ok


def test_manifest_rejects_shards_with_other_arrays(copy: Path) -> None:
    members = {s: b for s, b in make_sample(9).members.items() if s != "text.npy"}
    write_shard([Sample("k", members)], str(copy), 4, failures={})
    with pytest.raises(ShardError, match="other settings"):
        write_manifest(str(copy), FINGERPRINT)


def test_manifest_rejects_shards_of_other_fingerprint(copy: Path) -> None:
    with pytest.raises(ShardError, match="another fingerprint"):
        write_manifest(str(copy), {**FINGERPRINT, "text": {}})


@pytest.mark.parametrize("point", ["shard.written", "shard.tar", "shard.index", "shard.commit"])
def test_failed_shard_write_is_recovered(point: Point, tmp_path: Path) -> None:
    samples = [make_sample(number) for number in range(3)]
    with pytest.raises(FaultError):
        write_shard(
            samples, str(tmp_path), 0, failures={}, fault=Fault(point, "error", 1).trigger_at
        )
    assert len(read_commits(str(tmp_path))) == (point == "shard.commit")
    other = [make_sample(number) for number in range(2)]
    write_shard(other, str(tmp_path), 0, failures={"timeout": 1})
    remove_uncommitted(str(tmp_path))
    manifest = write_manifest(str(tmp_path), FINGERPRINT)
    assert len(manifest.shards) == 1
    assert verify(str(tmp_path)).problems == ()


def test_interrupted_manifest_write_is_recovered(copy: Path) -> None:
    write_shard([make_sample(99)], str(copy), 4, failures={}, fingerprint=FINGERPRINT)
    with pytest.raises(FaultError):
        write_manifest(
            str(copy), FINGERPRINT, fault=Fault("manifest.checksum", "error", 1).trigger_at
        )
    with pytest.raises(ShardError, match="sha256 beside it"):
        ShardReader(str(copy))
    write_manifest(str(copy), FINGERPRINT)
    assert verify(str(copy)).ok


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    stored=st.sets(st.sampled_from(["moments", "clip", "tokens", "text"])),
    image=st.sampled_from([None, "jpg", "png", "webp", "gif"]),
    order=st.randoms(use_true_random=False),
)
def test_shards_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    counts: list[int],
    stored: set[str],
    image: str | None,
    order: Any,
) -> None:
    directory = tmp_path_factory.mktemp("round")
    samples: list[Sample] = []
    for index, count in enumerate(counts):
        shard_samples = [make_sample(len(samples) + number, image=image) for number in range(count)]
        kept = {"json", image, *(f"{name}.npy" for name in stored)}
        shard_samples = [
            Sample(s.key, {m: b for m, b in s.members.items() if m in kept}) for s in shard_samples
        ]
        write_shard(shard_samples, str(directory), index, failures={})
        samples += shard_samples
    write_manifest(str(directory), {})
    reader = ShardReader(str(directory))
    assert list(reader.keys) == [sample.key for sample in samples]
    assert len(reader) == len(reader.keys) == len(samples)
    indices = order.choices(range(len(samples)), k=9) if samples else []
    batch = reader.read(indices)
    assert set(batch) == (stored if samples else set())
    for name, array in batch.items():
        assert array.flags.c_contiguous and array.flags.writeable
        expected = [npy_array(samples[index].members[f"{name}.npy"]) for index in indices]
        np.testing.assert_array_equal(array, np.stack(expected))
    for index in indices:
        assert reader.read_json(index) == json.loads(samples[index].members["json"])
        assert reader.read_image(index) == (samples[index].members[image] if image else None)
        assert reader.keys[index] == samples[index].key
    assert verify(str(directory)).ok


def test_reader_selects_arrays_and_checks_indices(data: Path) -> None:
    reader = ShardReader(str(data), FINGERPRINT)
    assert list(reader.read(np.array([5, 5]), ["tokens"])) == ["tokens"]
    assert {name: array.shape for name, array in reader.read([]).items()} == {
        "moments": (0, 8, 4, 4),
        "clip": (0, 16),
        "tokens": (0, 77),
        "text": (0, 77, 6),
    }
    for bad in ([8], [-1], [[0]], [0.5]):
        with pytest.raises(IndexError):
            reader.read(bad)
    with pytest.raises(ShardError, match="nonsense"):
        reader.read([0], ["nonsense"])
    assert reader.keys[-1] == "train-7-0-0"
    assert reader.keys[2:4] == ["train-2-0-0", "train-3-0-0"]
    np.testing.assert_array_equal(reader.empty_tokens, np.full(77, 49407))
    assert reader.empty_text.shape == (77, 6)


def test_fingerprint_mismatch_error_names_fields(data: Path) -> None:
    expected = {"image": {"vae": "ab12", "resolution": 64}, "text": {"num_windows": 1}, "new": 1}
    with pytest.raises(ShardError, match=r"image\.resolution: 32, expected 64; new: absent") as err:
        ShardReader(str(data), expected)
    assert "vae" not in str(err.value)


def test_unfinished_data_is_rejected(copy: Path) -> None:
    (copy / "manifest.json.sha256").unlink()
    with pytest.raises(ShardError, match="same `d2i preprocess` command"):
        ShardReader(str(copy))


def test_threads_share_reader(data: Path) -> None:
    expected = ShardReader(str(data)).read(range(8))
    reader = ShardReader(str(data))

    def read(seed: int) -> bool:
        order = np.random.default_rng(seed).permutation(8)
        batch = reader.read(order)
        return all(np.array_equal(batch[name], expected[name][order]) for name in expected)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(200)))


def test_reader_keeps_no_file_open(tmp_path: Path) -> None:
    open_files = Path("/proc/self/fd")
    if not open_files.is_dir():
        pytest.skip("no list of open files here")
    make_data(tmp_path, *[1] * 20)
    before = len(list(open_files.iterdir()))
    reader = ShardReader(str(tmp_path))
    reader.read(range(20))
    assert len(list(open_files.iterdir())) <= before + 1


def test_max_mapped_shards_limits_open_maps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps, num_shards, max_mapped = Path("/proc/self/maps"), 24, 5
    if not maps.exists():
        pytest.skip("no list of maps here")
    make_data(tmp_path, *[1] * num_shards)
    expected = ShardReader(str(tmp_path)).read(range(num_shards))
    monkeypatch.setattr("d2i.shards.cache.mmap_shards.max_mapped_shards", lambda: max_mapped)
    reader = ShardReader(str(tmp_path))

    def read(seed: int) -> bool:
        order = np.random.default_rng(seed).permutation(num_shards)
        batch = reader.read(order)
        keys = [reader.keys[position] for position in order[:6]]
        return np.array_equal(batch["clip"], expected["clip"][order]) and keys == [
            make_sample(int(position)).key for position in order[:6]
        ]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(40)))
    # Maps of open shards, and of shards whose index alone was read.
    mapped = [line for line in maps.read_text().splitlines() if str(tmp_path) in line]
    assert 0 < len(mapped) <= 3 * max_mapped


def test_remote_shards_are_cached(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://{tmp_path.name}/data"
    for name, content in contents(data).items():
        storage.write_bytes(storage.join(url, name), content)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    expected = ShardReader(str(data)).read([7, 0])
    for _ in range(2):
        batch = ShardReader(url, cache_dir=tmp_path).read([7, 0])
        assert all(np.array_equal(batch[name], expected[name]) for name in expected)
    assert len(list(tmp_path.glob("*.d2i-tar"))) == 2
    assert np.array_equal(ShardReader(url).read([7])["clip"], expected["clip"][:1])
    assert len(list(tmp_path.glob("cache/d2i/*/*.d2i-tar"))) == 1
    assert verify(url).ok


def test_shards_import_neither_torch_nor_ray() -> None:
    code = "import sys, d2i.shards; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_verify_reports_no_problem_for_good_data(data: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = verify(str(data), num_threads=2, on_progress=lambda *at: seen.append(at))
    assert (report.num_shards, report.num_samples, report.problems) == (4, 8, ())
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_verify_finds_damage_that_webdataset_misses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Truncated at a sample, a bit flipped, shards swapped: no plain tar reader can detect it."""
    monkeypatch.setenv("WDS_SECURE", "1")
    wds = pytest.importorskip("webdataset")
    make_data(tmp_path, 3, 3)
    one, two = sorted(tmp_path.glob("*.tar"))
    good = one.read_bytes()
    with tarfile.open(one) as file:
        second = [m for m in file.getmembers() if m.name.endswith(".json")][1]
        inside = file.getmember(second.name.replace("json", "text.npy"))
    flipped = bytearray(good)
    flipped[inside.offset_data + 500] ^= 1
    damages = {"size": (good[: second.offset], 1), "sha256": (bytes(flipped), 3)}
    damages["structure"] = (two.read_bytes(), 3)
    for reason, (damaged, num_theirs) in damages.items():
        one.write_bytes(damaged)
        theirs = wds.WebDataset([str(one)], shardshuffle=False).decode()
        assert sum(1 for _ in theirs) == num_theirs, "it says nothing"
        assert (".tar", reason) in reasons(tmp_path)
    one.write_bytes(good[: inside.offset_data + 300])
    assert reasons(tmp_path) == {(".tar", "size"), (".tar", "structure")}
    with pytest.raises(Exception, match="unexpected end of data"):
        list(wds.WebDataset([str(one)], shardshuffle=False).decode())
    one.write_bytes(good)
    assert verify(str(tmp_path)).ok


def test_swapped_shard_is_not_read(tmp_path: Path) -> None:
    make_data(tmp_path, 3, 3)
    one, two = sorted(tmp_path.glob("*.tar"))
    one.write_bytes(two.read_bytes())
    with pytest.raises(ShardError, match=r"does not hold train-0-0-0\.clip\.npy where its index"):
        ShardReader(str(tmp_path)).read([0], ["clip"])


@pytest.fixture
def small(tmp_path: Path) -> Path:
    make_data(tmp_path, 2)
    return tmp_path


@settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(pick=st.integers(0), bit=st.integers(0))
def test_verify_finds_every_flipped_bit(small: Path, pick: int, bit: int) -> None:
    with flipped_bit(small, pick, bit) as path:
        problems = verify(str(small)).problems
        assert any(problem.file in (path.name, "manifest.json") for problem in problems)


@settings(
    deadline=None,
    max_examples=80,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(pick=st.integers(0), length=st.integers(0))
def test_truncated_file_is_found_and_never_read(small: Path, pick: int, length: int) -> None:
    expected = ShardReader(str(small)).read([0, 1])
    files = sorted(small.iterdir())
    path = files[pick % len(files)]
    good = path.read_bytes()
    path.write_bytes(good[: length % len(good)])
    try:
        assert not verify(str(small)).ok
        reader = ShardReader(str(small))
        batch = reader.read([0, 1])
        empty = reader.empty_text, reader.empty_tokens
    except ShardError:
        return
    finally:
        path.write_bytes(good)
    assert path.name.endswith(".commit.json"), "only the commit record is not needed to read"
    assert len(empty) == len(batch) / 2
    assert all(np.array_equal(batch[name], expected[name]) for name in expected)


def test_verify_finds_missing_and_unlisted_files(copy: Path) -> None:
    (copy / "plan").mkdir()
    (copy / "ledger").mkdir()
    assert verify(str(copy)).ok
    for path in [*copy.glob("000000*"), copy / "empty_text.npy"]:
        path.unlink()
    (copy / "000009-x.tar").write_bytes(b"")
    assert reasons(copy) == {
        (".tar", "missing"),
        (".arrow", "missing"),
        (".json", "missing"),
        (".npy", "missing"),
        (".tar", "unlisted"),
    }


BAD_METADATA: dict[str, tuple[dict[str, Any], str]] = {
    "another key": ({"key": "train-1-0-0"}, "belongs to 'train-1-0-0'"),
    "another split": ({"split": "dev"}, "split"),
    "no picture": ({"split": "test"}, "has no image; expected one in test"),
    "unknown field": ({"more": 1}, "more"),
    "turn": ({"turn": -1}, "turn"),
    "context": ({"context": [{"text": "no speaker"}]}, "speaker"),
    "source": ({"source": {}}, "source"),
    "no address": ({"source": metadata("")["source"] | {"ref": []}}, "ref"),
}


@pytest.mark.parametrize("case", BAD_METADATA)
def test_verify_finds_invalid_sample_metadata(case: str, tmp_path: Path) -> None:
    changes, message = BAD_METADATA[case]
    sample = make_sample(0, image=None)
    members = {**sample.members, "json": json_bytes(metadata(sample.key, **changes))}
    write_shard([Sample(sample.key, members)], str(tmp_path), 0, failures={})
    write_manifest(str(tmp_path), {})
    (problem,) = verify(str(tmp_path)).problems
    assert problem.reason == "member" and message in problem.detail


def test_manifest_rejects_invalid_empty_text_features(copy: Path) -> None:
    for name, bad in (
        ("empty_text.npy", np.full((77, 6), np.inf, np.float16)),
        ("empty_tokens.npy", np.full(77, 65535, np.uint16)),
        ("empty_tokens.npy", np.zeros(76, np.uint16)),
        ("empty_tokens.npy", np.zeros(0, np.uint16)),
    ):
        good = (copy / name).read_bytes()
        (copy / name).write_bytes(npy_bytes(bad))
        with pytest.raises(ShardError):
            write_manifest(str(copy), FINGERPRINT)
        (copy / name).write_bytes(good)


def test_verify_holds_few_indexes_in_memory(tmp_path: Path) -> None:
    num_shards, num_threads = 24, 3
    make_data(tmp_path, *[1] * num_shards)
    num_indexes: list[int] = []

    def count(done: int, num: int) -> None:
        assert (done, num) == (len(num_indexes) + 1, num_shards)
        num_indexes.append(sum(type(found) is Index for found in gc.get_objects()))

    before = sum(type(found) is Index for found in gc.get_objects())
    assert verify(str(tmp_path), num_threads=num_threads, on_progress=count).ok
    assert max(num_indexes) - before <= num_threads + 2


def test_verify_finds_key_in_two_shards(tmp_path: Path) -> None:
    for index in range(2):
        write_shard([make_sample(0, seed=index)], str(tmp_path), index, failures={})
    write_manifest(str(tmp_path), {})
    assert reasons(tmp_path) == {(".tar", "duplicate")}


def test_manifest_rejects_damaged_commit(copy: Path) -> None:
    path = next(copy.glob("*.commit.json"))
    path.write_bytes(path.read_bytes().replace(b'"timeout": 2', b'"timeout": "2"'))
    with pytest.raises(ShardError, match=r"failures\.timeout"):
        write_manifest(str(copy), FINGERPRINT)


def forge(directory: Path, tar: bytes, index: bytes, **changes: Any) -> None:
    """Replace the only shard of a data set and make every recorded hash and size agree."""
    (old,) = read_commits(str(directory))
    for path in directory.glob(f"{old.name}*"):
        path.unlink()
    info = file_info(tar)
    record = old.model_dump(mode="json") | {
        "name": shard_name(0, info.sha256),
        "tar": info.model_dump(),
        "index_file": file_info(index).model_dump(),
        **changes,
    }
    name = record["name"]
    (directory / f"{name}.tar").write_bytes(tar)
    (directory / f"{name}.arrow").write_bytes(index)
    canonical = json.dumps(record, sort_keys=True, indent=1) + "\n"
    (directory / f"{name}.commit.json").write_text(canonical)
    write_manifest(str(directory), {})


@pytest.fixture
def single(tmp_path: Path) -> Path:
    write_shard([make_sample(n) for n in range(2)], str(tmp_path), 0, failures={})
    write_manifest(str(tmp_path), {})
    return tmp_path


def rebuild(
    directory: Path, change: Callable[[tarfile.TarInfo], None]
) -> tuple[bytes, list[IndexRow]]:
    """Rewrite the shard with tarfile, changing headers; return it and its index rows."""
    (path,) = directory.glob("*.tar")
    out = io.BytesIO()
    rows: dict[str, dict[str, Extent]] = {}
    with tarfile.open(path) as source, tarfile.open(fileobj=out, mode="w:") as target:
        for member in source.getmembers():
            content = source.extractfile(member).read()  # type: ignore[union-attr]
            key, _, suffix = member.name.partition(".")
            change(member)
            target.addfile(member, io.BytesIO(content))
            start = target.offset - (len(content) + -len(content) % 512)
            rows.setdefault(key, {})[suffix] = Extent(start, len(content), zlib.crc32(content))
    return out.getvalue(), [IndexRow(key, extents) for key, extents in rows.items()]


def _link(member: tarfile.TarInfo) -> None:
    if member.name.endswith(".jpg"):
        member.type, member.linkname = tarfile.SYMTYPE, "../../secret"


def _rename(old: str, new: str) -> Callable[[tarfile.TarInfo], None]:
    def change(member: tarfile.TarInfo) -> None:
        member.name = member.name.replace(old, new)

    return change


def _device(member: tarfile.TarInfo) -> None:
    member.type = tarfile.CHRTYPE


def _mode(member: tarfile.TarInfo) -> None:
    member.mode = 0o4755


HOSTILE = {
    "link": _link,
    "device": _device,
    "setuid": _mode,
    "parent": _rename("train-1", "../train-1"),
    "absolute": _rename("train-1", "/train-1"),
    "pickle": _rename(".jpg", ".pkl"),
    "long name": _rename("train-1", "train-1" * 20),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_verify_finds_hostile_tars(single: Path, name: str) -> None:
    tar, rows = rebuild(single, HOSTILE[name])
    forge(single, tar, index_bytes(rows, FORMAT_1))
    assert (".tar", "structure") in reasons(single)


@pytest.mark.parametrize("name", ["link", "device", "setuid"])
@pytest.mark.parametrize("suffix", ["moments.npy", "json", "jpg"])
def test_hostile_member_is_not_read(name: str, suffix: str, tmp_path: Path) -> None:
    """Whatever the member, and although all checksums are forged to match."""
    write_shard([make_sample(n) for n in range(3)], str(tmp_path), 0, failures={})
    write_manifest(str(tmp_path), {})
    kinds = {"link": tarfile.SYMTYPE, "device": tarfile.CHRTYPE}

    def change(member: tarfile.TarInfo) -> None:
        if member.name == f"train-1-0-0.{suffix}":
            member.type = kinds.get(name, tarfile.REGTYPE)
            member.mode = 0o4755 if name == "setuid" else member.mode

    tar, rows = rebuild(tmp_path, change)
    forge(tmp_path, tar, index_bytes(rows, FORMAT_1))
    reader = ShardReader(str(tmp_path))
    assert len(reader.read([0, 2])["clip"]) == 2
    reads: dict[str, Callable[[], Any]] = {
        "moments.npy": lambda: reader.read([0, 1]),
        "json": lambda: reader.read_json(1),
        "jpg": lambda: reader.read_image(1),
    }
    for read in (reads[suffix], reads[suffix], lambda: reader.read_members(1)):
        with pytest.raises(ShardError, match=rf"does not hold train-1-0-0\.{suffix} where"):
            read()


def test_verify_finds_hidden_members_and_trailing_bytes(single: Path) -> None:
    (path,) = single.glob("*.tar")
    (index,) = single.glob("*.arrow")
    forge(single, path.read_bytes() + b"\0" * 512, good_index := index.read_bytes())
    assert reasons(single) == {(".tar", "structure")}
    rows = list(read_index(good_index, FORMAT_1, num_samples=2, tar_size_bytes=1 << 30).rows())
    (path,) = single.glob("*.tar")
    forge(single, path.read_bytes()[:-512], index_bytes(rows[1:], FORMAT_1), num_samples=1)
    assert reasons(single) == {(".tar", "structure")}


@pytest.mark.parametrize(
    "hostile",
    [np.zeros((4, 8, 4), np.float16), np.zeros((8, 4, 4), np.uint16)],
    ids=["shape", "dtype"],
)
def test_arrays_unlike_manifest_are_rejected(single: Path, hostile: np.ndarray[Any, Any]) -> None:
    (path,) = single.glob("*.tar")
    (index,) = single.glob("*.arrow")
    good, bad = npy_header("float16", (8, 4, 4)), npy_header(hostile.dtype.name, hostile.shape)
    tar, rows = path.read_bytes().replace(good, bad), []
    for row in read_index(
        index.read_bytes(), FORMAT_1, num_samples=2, tar_size_bytes=len(tar)
    ).rows():
        at = row.extents["moments.npy"]
        crc32 = zlib.crc32(tar[at.offset : at.offset + at.size_bytes])
        extents = {**row.extents, "moments.npy": Extent(at.offset, at.size_bytes, crc32)}
        rows.append(IndexRow(row.key, extents))
    forge(single, tar, index_bytes(rows, FORMAT_1))
    assert reasons(single) == {(".tar", "member")}
    for row in (0, 1):
        with pytest.raises(ShardError, match=r"moments\.npy is not npy float16 \(8, 4, 4\)"):
            ShardReader(str(single)).read([row])


@pytest.mark.parametrize(
    ("offset", "size"),
    [(1 << 40, 384), (512, 1 << 40), (2**64 - 1, 384), (0, 384), (2048, 383)],
)
def test_extents_outside_tar_are_rejected(single: Path, offset: int, size: int) -> None:
    (path,) = single.glob("*.tar")
    (index,) = single.glob("*.arrow")
    rows = list(
        read_index(index.read_bytes(), FORMAT_1, num_samples=2, tar_size_bytes=1 << 30).rows()
    )
    rows[1] = IndexRow(rows[1].key, {**rows[1].extents, "moments.npy": Extent(offset, size, 0)})
    forge(single, path.read_bytes(), index_bytes(rows, FORMAT_1))
    assert not verify(str(single)).ok
    with pytest.raises(ShardError):
        ShardReader(str(single)).read([0])


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_index_reader_survives_fuzz(data: st.DataObject) -> None:
    good = index_bytes([IndexRow("k", {"json": Extent(512, 10, 1)})], FORMAT_1)
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(1, 8))):
        bad[data.draw(st.integers(0, len(bad) - 1))] = data.draw(st.integers(0, 255))
    try:
        index = read_index(bytes(bad), FORMAT_1, num_samples=1, tar_size_bytes=2048)
    except ShardError:
        return
    assert all(e.offset + e.size_bytes <= 2048 for e in index.row(0).extents.values())


def index_of(rows: Any, schema: pa.Schema, **options: Any) -> bytes:
    sink, options = pa.BufferOutputStream(), pa.ipc.IpcWriteOptions(**options)
    with pa.ipc.new_file(sink, schema, options=options) as file:
        file.write_batch(rows)
    return bytes(sink.getvalue())


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_compressed_index_is_rejected_before_decompression(codec: str) -> None:
    extent = {"json": Extent(512, 10, 1)}
    good = index_bytes([IndexRow(f"{n:088}", extent) for n in range(100_000)], FORMAT_1)
    batch = pa.ipc.open_file(good).get_batch(0)
    bomb = index_of(batch, batch.schema, compression=codec)
    assert 20 * len(bomb) < len(good)
    before = pa.total_allocated_bytes()
    with pytest.raises(ShardError, match="compressed"):
        read_index(bomb, FORMAT_1, num_samples=100_000, tar_size_bytes=2048)
    assert pa.total_allocated_bytes() == before


def test_index_rejects_schema_metadata_and_empty_extents() -> None:
    batch = pa.ipc.open_file(
        index_bytes([IndexRow("k", {"json": Extent(512, 10, 1)})], FORMAT_1)
    ).get_batch(0)
    hidden = batch.replace_schema_metadata({"hidden": "text"})
    with pytest.raises(ShardError, match="unexpected columns"):
        read_index(index_of(hidden, hidden.schema), FORMAT_1, num_samples=1, tar_size_bytes=2048)
    for absent in (Extent(0, 1, 0), Extent(0, 0, 1)):
        rows = [IndexRow("k", {"json": Extent(512, 10, 1), "png": absent})]
        with pytest.raises(ShardError, match="without an offset in the tar"):
            read_index(index_bytes(rows, FORMAT_1), FORMAT_1, num_samples=1, tar_size_bytes=2048)


def test_index_rejects_invalid_keys() -> None:
    hostile = index_bytes([IndexRow("../../etc/x", {"json": Extent(512, 10, 1)})], FORMAT_1)
    with pytest.raises(ShardError, match="key"):
        read_index(hostile, FORMAT_1, num_samples=1, tar_size_bytes=2048)


@given(st.binary(max_size=200))
def test_manifest_reader_survives_fuzz(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes
) -> None:
    directory = tmp_path_factory.mktemp("fuzz")
    (directory / "manifest.json").write_bytes(junk)
    digest = file_info(junk).sha256
    (directory / "manifest.json.sha256").write_text(f"{digest}  manifest.json\n")
    with pytest.raises(ShardError):
        read_manifest(str(directory))
