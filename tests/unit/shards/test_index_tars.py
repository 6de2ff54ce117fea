"""Tars that d2i did not write: indexed, read at random, verified; a bad one is one line."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import subprocess
import sys
import tarfile
import tracemalloc
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import webdataset as wds
import wids

from d2i.errors import ConfigError, ShardError
from d2i.io import checksums
from d2i.shards import (
    ShardReader,
    find_data_sets,
    index_tars,
    is_indexed,
    verify,
    write_manifest,
    write_shard,
)
from d2i.shards.tar_scan import npy_array_info, split_name
from tests.processes import run_d2i, run_process
from tests.unit.shards import test_layout, test_shards

Files = Sequence[tuple[str, bytes]]
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def write_tar(path: Path, files: Files, form: int = tarfile.PAX_FORMAT) -> None:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1_700_000_000
            tar.addfile(info, io.BytesIO(data))


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def stream_of(directory: Path) -> list[dict[str, Any]]:
    """Read the samples of all tars as webdataset does, in order."""
    urls = [str(path) for path in sorted(directory.glob("*.tar"))]
    return list(wds.WebDataset(urls, shardshuffle=False, empty_check=False))


def members_of(sample: dict[str, Any]) -> dict[str, bytes]:
    return {name: data for name, data in sample.items() if not name.startswith("__")}


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Two tars by webdataset's own writer, whose samples have arrays, texts and images."""
    directory = tmp_path / "tars"
    directory.mkdir()
    for number, count in enumerate((3, 2)):
        with wds.TarWriter(str(directory / f"part.{number}.tar")) as writer:
            for place in range(count):
                value = 10 * number + place
                writer.write(
                    {
                        "__key__": f"{number}/im{place:04}",
                        "jpg": b"\xff\xd8 image %d" % value,
                        "txt": f"caption {value}",
                        "json": {"width": value},
                        "cls": value,
                        "npy": np.array([value, -value]),
                        "emb.npy": np.full((2, 3), value, np.float32),
                        "flag.npy": np.array(value % 2 == 0),
                        "boxes.npy": np.zeros((place + 1, 4)),
                    }
                )
    return directory


def test_indexed_tars_are_read_at_random_as_webdataset_streams_them(tars: Path) -> None:
    before = contents(tars)
    done = index_tars(str(tars))
    assert {name: contents(tars)[name] for name in before} == before
    reader, theirs = ShardReader(str(tars)), stream_of(tars)
    assert (done.tars.num_samples, done.num_other_files) == (len(theirs), 0) == (5, 0)
    assert list(reader.keys) == [sample["__key__"] for sample in theirs]
    assert list(reader.keys)[:2] == ["0/im0000", "0/im0001"]
    for position in (4, 0, 2):
        assert reader.read_members(position) == members_of(theirs[position])
        assert reader.read_image(position) == theirs[position]["jpg"]
        assert reader.read_json(position) == json.loads(theirs[position]["json"])


def test_arrays_are_those_that_all_samples_have_in_one_shape(tars: Path) -> None:
    index_tars(str(tars))
    reader, order = ShardReader(str(tars)), [4, 1, 1, 0]
    batch = reader.read(order)
    assert {name: (a.dtype.name, a.shape) for name, a in batch.items()} == {
        "emb": ("float32", (4, 2, 3)),
        "flag": ("bool", (4,)),
        "npy": ("int64", (4, 2)),
    }
    for name, array in batch.items():
        suffix = "npy" if name == "npy" else f"{name}.npy"
        for place, position in enumerate(order):
            stored = np.load(io.BytesIO(reader.read_members(position)[suffix]))
            np.testing.assert_array_equal(array[place], stored)
    with pytest.raises(ShardError, match=r"stores no 'boxes', only emb, flag, npy; .*read_members"):
        reader.read([0], ["boxes"])
    with pytest.raises(ShardError, match="d2i did not prepare"):
        _ = reader.manifest


@pytest.mark.parametrize("form", FORMATS)
def test_names_of_any_form_are_grouped_as_webdataset_groups_them(form: str, tmp_path: Path) -> None:
    deep = "a/" * 60 if form == "ustar" else "a/" * 120
    files = [
        ("__meta__", b"no sample"),
        ("__notes__/x.txt", b"no sample"),
        ("README", b"no sample"),
        ("./one.JPG", b"1"),
        ("./one.left.png", b"2"),
        ("README", b"no sample"),
        ("./one.txt", b""),
        ("v1.5/two words.txt", b"3"),
        (f"{deep}three.txt", b"4"),
        ("größe.txt", b"5"),
    ]
    write_tar(tmp_path / "x.tar", files, FORMATS[form])
    with tarfile.open(tmp_path / "x.tar", "a", format=FORMATS[form]) as tar:
        directory = tarfile.TarInfo("later")
        directory.type = tarfile.DIRTYPE
        tar.addfile(directory)
    done = index_tars(str(tmp_path))
    reader, theirs = ShardReader(str(tmp_path)), stream_of(tmp_path)
    assert done.num_other_files == 4
    assert list(reader.keys) == [s["__key__"] for s in theirs]
    assert [reader.read_members(n) for n in range(4)] == [members_of(s) for s in theirs]
    assert verify(str(tmp_path)).ok


def test_hidden_files_belong_to_no_sample() -> None:
    assert split_name("a/.DS_Store") is split_name("./._0.jpg") is split_name("0.") is None
    assert split_name("a.b/0.seg.PNG") == ("a.b/0", "seg.png")


def test_indexing_again_writes_the_same_bytes_and_follows_the_tars(tars: Path) -> None:
    index_tars(str(tars))
    first = contents(tars)
    times = {path: path.stat().st_mtime_ns for path in (tars / "d2i-index").glob("[!.]*")}
    index_tars(str(tars))
    assert contents(tars) == first
    assert {path: path.stat().st_mtime_ns for path in times} == times
    (tars / "part.0.tar").unlink()
    write_tar(tars / "part.2.tar", [("x.txt", b"new")])
    index_tars(str(tars))
    assert sorted(path.name for path in (tars / "d2i-index").glob("*.arrow")) == [
        "part.1.arrow",
        "part.2.arrow",
    ]
    reader = ShardReader(str(tars))
    assert list(reader.keys) == ["1/im0000", "1/im0001", "x"]
    assert reader.arrays == {}
    assert verify(str(tars)).ok


def test_wids_reads_the_list_of_tars(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index_tars(str(tars))
    monkeypatch.setenv("WIDS_CACHE", str(tars / "cache"))
    reader = ShardReader(str(tars))
    theirs = wids.ShardListDataset(
        str(tars / "d2i-index" / "shards.json"), transformations=[], keep=True
    )
    assert len(theirs) == len(reader)
    for position in (4, 0):
        sample = theirs[position]
        assert sample["__key__"] == reader.keys[position]
        for suffix, data in reader.read_members(position).items():
            assert sample[f".{suffix}"].read() == data


WITH_OTHER_FILES = [
    ("__meta__/info.json", b"{}"),
    ("._0.txt", b"of macOS"),
    ("0.txt", b"zero"),
    ("1.txt", b"one"),
]


def test_wids_counts_files_of_no_sample_and_the_command_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WIDS_CACHE", str(tmp_path / "cache"))
    write_tar(tmp_path / "a.tar", WITH_OTHER_FILES)
    said = run_process("index", tmp_path).stdout
    assert "2 files belong to no sample" in said
    assert "wids counts those with a dot in their path as samples" in said
    reader = ShardReader(str(tmp_path))
    assert list(reader.keys) == [s["__key__"] for s in stream_of(tmp_path)] == ["0", "1"]
    theirs = wids.ShardListDataset(
        str(tmp_path / "d2i-index" / "shards.json"), transformations=[], keep=True
    )
    assert [theirs[place]["__key__"] for place in range(len(theirs))] == ["__meta__/info", ""]


def test_webdataset_makes_samples_of_two_kinds_of_other_files(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("d/._0.txt", b"hidden"), ("0.txt", b"zero"), ("a.", b"dot")])
    assert index_tars(str(tmp_path)).num_other_files == 2
    assert list(ShardReader(str(tmp_path)).keys) == ["0"]
    theirs = [(sample["__key__"], members_of(sample)) for sample in stream_of(tmp_path)]
    assert theirs == [("d/", {"_0.txt": b"hidden"}), ("0", {"txt": b"zero"}), ("a", {"": b"dot"})]


def problems(directory: Path) -> set[tuple[str, str]]:
    return {(p.file, p.reason) for p in verify(str(directory)).problems}


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_verify_names_the_member_that_changed_and_no_reader_returns_it(tars: Path) -> None:
    index_tars(str(tars))
    path = tars / "part.0.tar"
    flip(path, path.read_bytes().index(b"\xff\xd8 image 1"))
    with_emb = path.read_bytes().index(np.full((2, 3), 2, np.float32).tobytes())
    flip(path, with_emb)
    assert problems(tars) == {("part.0.tar", "sha256"), ("part.0.tar", "member")}
    named = [p.detail for p in verify(str(tars)).problems if p.reason == "member"]
    assert sorted(line.partition(" do not")[0] for line in named) == [
        "0/im0001: jpg",
        "0/im0002: emb.npy",
    ]
    reader = ShardReader(str(tars))
    assert reader.read_image(0) == b"\xff\xd8 image 0"
    with pytest.raises(ShardError, match="does not match its checksum; run `d2i verify`"):
        reader.read_image(1)
    with pytest.raises(ShardError, match=r"im0002.emb.npy does not match its checksum"):
        reader.read([0, 2])


def test_verify_finds_tars_that_changed_vanished_or_appeared(tars: Path) -> None:
    index_tars(str(tars))
    first, second = tars / "part.0.tar", tars / "part.1.tar"
    kept = first.read_bytes()
    write_tar(first, [("0/im0000.jpg", b"another"), ("other.jpg", b"x")])
    second.rename(tars / "part.9.tar")
    found = verify(str(tars)).problems
    assert {(p.file, p.reason) for p in found} == {
        ("part.0.tar", "size"),
        ("part.1.tar", "missing"),
        ("part.9.tar", "unlisted"),
    }
    assert "changed since it was indexed" in found[0].detail
    assert "d2i index" in found[0].detail
    with pytest.raises(ShardError, match="run `d2i verify`"):
        ShardReader(str(tars)).read([0])
    with pytest.raises(ShardError, match=r"missing a file of shard part\.1"):
        ShardReader(str(tars)).read([4])
    first.write_bytes(kept[:-20_000])
    assert ("part.0.tar", "structure") in problems(tars)


def test_damage_of_the_index_is_found(tars: Path) -> None:
    index_tars(str(tars))
    index, listed = tars / "d2i-index" / "part.1.arrow", tars / "d2i-index" / "shards.json"
    for place in range(0, index.stat().st_size, 199):
        flip(index, place)
        assert ("d2i-index/part.1.arrow", "sha256") in problems(tars)
        with pytest.raises(ShardError, match=r"sha256 in d2i-index/shards\.json"):
            ShardReader(str(tars)).read([4])
        flip(index, place)
    for place in range(0, listed.stat().st_size, 199):
        flip(listed, place)
        assert problems(tars) == {("d2i-index/shards.json", "manifest")}
        with pytest.raises(ShardError, match="run `d2i index"):
            ShardReader(str(tars))
        flip(listed, place)
    assert verify(str(tars)).ok
    index.unlink()
    assert problems(tars) == {("d2i-index/part.1.arrow", "missing")}
    index_tars(str(tars))
    listed.with_name("shards.json.sha256").unlink()
    (found,) = verify(str(tars)).problems
    assert (found.file, found.reason) == ("d2i-index/shards.json.sha256", "missing")
    assert f"run `d2i index {tars}` again" in found.detail
    index_tars(str(tars))
    assert verify(str(tars)).ok


def test_an_index_of_other_offsets_is_found_though_its_checksums_fit(tars: Path) -> None:
    index_tars(str(tars))
    other = tars.parent / "other"
    other.mkdir()
    write_tar(other / "part.1.tar", [("y/im0000.txt", b"1"), ("y/im0001.txt", b"2")])
    index_tars(str(other))
    forged = (other / "d2i-index" / "part.1.arrow").read_bytes()
    theirs = json.loads((other / "d2i-index" / "shards.json").read_text())["shardlist"][0]
    listed = json.loads((tars / "d2i-index" / "shards.json").read_text())
    for field in ("index_file", "suffixes", "arrays"):
        listed["shardlist"][1][field] = theirs[field]
    text = json.dumps(listed, sort_keys=True, indent=1) + "\n"
    checksums.write_bytes(str(tars / "d2i-index" / "shards.json"), text.encode())
    (tars / "d2i-index" / "part.1.arrow").write_bytes(forged)
    assert problems(tars) == {("d2i-index/part.1.arrow", "index")}


def truncated(path: Path) -> None:
    write_tar(path, [("a.bin", bytes(9_000)), ("b.bin", b"b")])
    path.write_bytes(path.read_bytes()[:5_000])


def without_end(path: Path) -> None:
    write_tar(path, [("a.bin", bytes(512))])
    path.write_bytes(path.read_bytes()[:1024])


def damaged_header(path: Path) -> None:
    write_tar(path, [("a.bin", bytes(512)), ("b.bin", bytes(512))])
    flip(path, 1024 + 130)


def gzipped(path: Path) -> None:
    write_tar(path, [("a.bin", b"a")])
    path.write_bytes(gzip.compress(path.read_bytes()))


def appended(path: Path) -> None:
    write_tar(path, [("a.bin", b"a")])
    path.write_bytes(2 * path.read_bytes())


def interleaved(path: Path) -> None:
    write_tar(path, [("a.jpg", b"a"), ("b.jpg", b"b"), ("a.txt", b"a")])


def repeated(path: Path) -> None:
    write_tar(path, [("a.jpg", b"a"), ("a.JPG", b"b")])


def linked(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)


def dotted(path: Path) -> None:
    write_tar(path, [(f"a.{number}.jpg", b"") for number in range(300)])


def not_utf8(path: Path) -> None:
    write_tar(path, [("\udcff\udcfe.jpg", b"a")], tarfile.GNU_FORMAT)


def giant_name(path: Path) -> None:
    write_tar(path, [("x" * (3 << 20) + ".jpg", b"a")], tarfile.GNU_FORMAT)


def nested_attributes(path: Path) -> None:
    """Nest thousands of PAX headers, each of which describes the next one."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 0
    path.write_bytes(info.tobuf() * 20_000)


def sparse(path: Path, attributes: dict[str, str], data: bytes) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.bin")
        info.size, info.pax_headers = len(data), attributes
        tar.addfile(info, io.BytesIO(data))


def sparse_map_without_end(path: Path) -> None:
    version = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "1"}
    sparse(path, version, b"99999999\n" + b"1\n" * 100_000)


def sparse_map_in_attributes(path: Path) -> None:
    sparse(path, {"GNU.sparse.size": "1", "GNU.sparse.map": "0,1,and so on"}, b"a")


def sparse_map_of_pairs(path: Path) -> None:
    sparse(path, {"GNU.sparse.size": "many"}, b"a")


def sparse_map_of_old_gnu(path: Path) -> None:
    """Announce more blocks of the map after each one, up to the end of the tar."""
    info = tarfile.TarInfo("a.bin")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[482] = 1
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]  # type: ignore[attr-defined]
    path.write_bytes(bytes(header) + (bytes(504) + b"\1" + bytes(7)) * 100)


BAD_TARS: dict[Callable[[Path], None], str] = {
    truncated: "bytes before the end of a member",
    without_end: "no member and no end",
    damaged_header: "no member and no end",
    gzipped: "but gzip.*decompress it",
    appended: "appended to one another",
    interleaved: "key 'a' occurs twice; expected the members of a sample side by side",
    repeated: "'a.JPG' occurs twice",
    linked: "is a link",
    dotted: "more than 256 suffixes.*first dot",
    not_utf8: "not UTF-8",
    giant_name: "a header of [0-9]+ bytes",
    nested_attributes: "not an intact tar",
    sparse_map_without_end: "a sparse file; expected regular files",
    sparse_map_in_attributes: "a sparse file; expected regular files",
    sparse_map_of_pairs: "a sparse file; expected regular files",
    sparse_map_of_old_gnu: "a sparse file; expected regular files",
    Path.touch: "empty file",
}


@pytest.mark.parametrize("make", BAD_TARS, ids=lambda make: make.__name__)
def test_bad_tar_is_one_line_and_nothing_is_listed(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    write_tar(tmp_path / "a.tar", [("a.txt", b"a")])
    make(tmp_path / "b.tar")
    with pytest.raises(ShardError, match=BAD_TARS[make]) as caught:
        index_tars(str(tmp_path))
    assert str(tmp_path / "b.tar") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "d2i-index" / "shards.json").exists()


def test_a_tar_without_files_has_no_samples(tmp_path: Path) -> None:
    write_tar(tmp_path / "empty.tar", [])
    write_tar(tmp_path / "full.tar", [("a.n.npy", npy(np.float64(3)))])
    index_tars(str(tmp_path))
    reader = ShardReader(str(tmp_path))
    assert (list(reader.keys), reader.read([0])["n"].tolist()) == (["a"], [3.0])
    assert verify(str(tmp_path)).ok


def test_keys_may_repeat_in_other_tars_only(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", [("0.txt", name.encode())])
    index_tars(str(tmp_path))
    reader = ShardReader(str(tmp_path))
    assert [reader.read_members(n) for n in range(2)] == [{"txt": b"a"}, {"txt": b"b"}]
    assert list(reader.keys) == ["0", "0"]


def test_a_sample_without_json_object_is_named(tmp_path: Path) -> None:
    members = [("0.json", b"[1]"), ("1.json", b""), ("2.json", b"{"), ("3.txt", b"{}")]
    write_tar(tmp_path / "a.tar", members)
    index_tars(str(tmp_path))
    reader = ShardReader(str(tmp_path))
    for position in range(4):
        found = "no json member" if position == 3 else "a json member that is no JSON object"
        expected = f"sample '{position}' of {tmp_path}/a.tar has {found}; .*read_members has the"
        with pytest.raises(ShardError, match=expected):
            reader.read_json(position)


@pytest.mark.parametrize(
    "data",
    [
        npy(np.array([{"a": 1}], object)),
        npy(np.zeros(2, [("x", "<f4"), ("y", "<i4")])),
        npy(np.zeros(2, ">f4")),
        npy(np.asfortranarray(np.zeros((2, 3)))),
        npy(np.zeros((0, 3))),
        npy(np.array(["text"])),
        npy(np.zeros(3)) + b"more",
        npy(np.zeros(3))[:-1],
        b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535,
        b"\x93NUMPY\x07\x00",
        b"",
    ],
)
def test_members_that_are_no_plain_array_stay_bytes(data: bytes, tmp_path: Path) -> None:
    assert npy_array_info(data, len(data)) is None
    write_tar(tmp_path / "a.tar", [("a.x.npy", data)])
    index_tars(str(tmp_path))
    reader = ShardReader(str(tmp_path))
    assert (reader.arrays, reader.read_members(0)) == ({}, {"x.npy": data})


def test_large_members_are_not_held_in_memory(tmp_path: Path) -> None:
    with (tmp_path / "a.tar").open("wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
        info = tarfile.TarInfo("a.bin")
        info.size = 300 << 20
        with Path("/dev/zero").open("rb") as zeros:
            tar.addfile(info, zeros)
    tracemalloc.start()
    index_tars(str(tmp_path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 30 << 20


def test_directories_that_are_not_plain_tars_are_refused(tmp_path: Path) -> None:
    prepared, compressed, empty = (tmp_path / name for name in ("data", "compressed", "empty"))
    test_shards.make_data(prepared / "train", 1)
    for directory in (compressed, empty):
        directory.mkdir()
    (compressed / "a.tar.gz").touch()
    for directory, expected in (
        (prepared, "has no .tar file; .* not in directories below it"),
        (prepared / "train", "was made by d2i preprocess.*run `d2i verify"),
        (compressed, "compressed tars, such as a.tar.gz.*decompress"),
        (empty, "has no .tar file"),
        (tmp_path / "none", "has no .tar file"),
    ):
        with pytest.raises(ConfigError, match=expected):
            index_tars(str(directory))
    assert not list(tmp_path.rglob("d2i-index"))


def test_tars_with_a_suffix_in_capitals_are_not_skipped(tars: Path) -> None:
    index_tars(str(tars))
    (tars / "part.1.tar").rename(tars / "part.1.TAR")
    (unlisted,) = [p for p in verify(str(tars)).problems if p.reason == "unlisted"]
    assert unlisted.file == "part.1.TAR"
    assert f"rename it to .tar, and run `d2i index {tars}`" in unlisted.detail
    with pytest.raises(ConfigError, match=r"holds part\.1\.TAR; .*rename it to .tar"):
        index_tars(str(tars))


@pytest.mark.parametrize("lost", [(), ("*.sha256", "*.commit.json"), ("manifest.json*",)])
def test_tars_of_d2i_are_refused_by_any_of_its_files(lost: Sequence[str], tmp_path: Path) -> None:
    test_shards.make_data(tmp_path / "data", 1)
    for path in [path for pattern in lost for path in (tmp_path / "data").glob(pattern)]:
        path.unlink()
    with pytest.raises(ConfigError, match="data was made by d2i preprocess"):
        index_tars(str(tmp_path / "data"))


@pytest.mark.parametrize("content", ["{}", "no JSON", '{"shards": [{"name": "part.0"}]}'])
@pytest.mark.parametrize("place", ["manifest.json", "train/manifest.json"])
def test_a_manifest_of_others_changes_nothing(place: str, content: str, tars: Path) -> None:
    index_tars(str(tars))
    (tars / place).parent.mkdir(exist_ok=True)
    (tars / place).write_text(content)
    assert is_indexed(str(tars))
    assert find_data_sets(str(tars)) == [str(tars)]
    assert verify(str(tars)).ok
    assert len(ShardReader(str(tars))) == 5
    before = contents(tars)
    index_tars(str(tars))
    assert contents(tars) == before


def test_prepared_splits_below_indexed_tars_are_found(tars: Path) -> None:
    test_shards.make_data(tars / "train", 1)
    index_tars(str(tars))
    assert find_data_sets(str(tars)) == [str(tars), str(tars / "train")]


def test_remote_tars_are_read_through_the_cache(tars: Path, tmp_path: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    store = fsspec.filesystem("memory")
    for path in tars.iterdir():
        store.pipe_file(f"{url}/{path.name}", path.read_bytes())
    index_tars(url)
    index_tars(str(tars))
    assert store.cat_file(f"{url}/d2i-index/shards.json") == (
        (tars / "d2i-index" / "shards.json").read_bytes()
    )
    reader, local = ShardReader(url, cache_dir=tmp_path / "cache"), ShardReader(str(tars))
    reader.prefetch([0, 1])
    for name, array in local.read([4, 0]).items():
        np.testing.assert_array_equal(reader.read([4, 0])[name], array)
    assert list(reader.keys) == list(local.keys)
    assert reader.read_members(3) == local.read_members(3)
    assert verify(url).ok
    store.pipe_file(f"{url}/part.1.tar", b"another")
    with pytest.raises(ShardError, match=r"part\.1\.tar, as fetched, .* sha256 recorded of it"):
        ShardReader(url, cache_dir=tmp_path / "empty").read([4])


def test_reader_of_indexed_tars_is_picklable(tars: Path) -> None:
    index_tars(str(tars))
    reader = ShardReader(str(tars), check_data=False)
    program = (
        "import pickle, sys; reader = pickle.load(sys.stdin.buffer); "
        "print(reader.read([4])['emb'].sum(), reader.keys[4])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], input=pickle.dumps(reader), capture_output=True, check=True
    )
    assert done.stdout.split() == [b"66.0", b"1/im0001"]


def test_command_indexes_and_the_other_commands_take_it(tars: Path) -> None:
    assert "run `d2i index" in run_process("verify", tars).stderr
    printed = run_d2i("index", tars, "--json")
    assert printed == {
        "num_samples": 5,
        "num_shards": 2,
        "size_bytes": sum(path.stat().st_size for path in tars.glob("*.tar")),
        "members": ["boxes.npy", "cls", "emb.npy", "flag.npy", "jpg", "json", "npy", "txt"],
        "arrays": {"emb": ["float32", 2, 3], "flag": ["bool"], "npy": ["int64", 2]},
        "num_other_files": 0,
    }
    assert run_d2i("verify", tars, "--json")["num_samples"] == 5
    assert run_d2i("inspect", tars, "--num", 1, "--json")["samples"][0]["key"] == "0/im0000"
    flip(tars / "part.1.tar", 600)
    damaged = run_process("verify", tars)
    assert (damaged.returncode, "sha256" in damaged.stdout) == (1, True)
    (tars / "part.1.tar").write_bytes(b"no tar")
    refused = run_process("index", tars)
    assert (refused.returncode, refused.stderr.count("error: ")) == (2, 1)
    assert "part.1.tar is not an intact tar" in refused.stderr.splitlines()[-1]


def as_prepared(directory: Path, version: int) -> Path:
    """Write two shards of three samples in a format of d2i."""
    make = test_shards if version == 1 else test_layout
    fingerprint = dict(make.FINGERPRINT)
    for index in range(2):
        samples = [make.make_sample(10 * index + number) for number in range(3)]
        write_shard(samples, str(directory), index, failures={}, fingerprint=fingerprint)
    write_manifest(str(directory), fingerprint)
    return directory


@pytest.mark.parametrize("version", [1, 2])
def test_webdataset_and_wids_read_the_tars_of_both_formats(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = as_prepared(tmp_path / "data", version)
    monkeypatch.setenv("WIDS_CACHE", str(tmp_path / "cache"))
    reader, streamed = ShardReader(str(data)), stream_of(data)
    shards = reader.manifest.shards
    by_number = wids.ShardListDataset(
        [{"url": str(data / s.tar_name), "nsamples": s.num_samples} for s in shards],
        transformations=[],
        keep=True,
    )
    assert len(streamed) == len(by_number) == len(reader) == 6
    for position, sample in enumerate(streamed):
        members = reader.read_members(position)
        assert (sample["__key__"], members_of(sample)) == (reader.keys[position], members)
        theirs = by_number[position]
        assert {suffix: theirs[f".{suffix}"].read() for suffix in members} == members
        for name, array in reader.read([position]).items():
            decoded = np.load(io.BytesIO(sample[f"{name}.npy"]), allow_pickle=False)
            np.testing.assert_array_equal(decoded, array[0])
