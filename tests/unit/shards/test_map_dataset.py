"""A split as a torch dataset and as a webdataset pipeline: the same samples, in any process."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import d2i
from d2i.dialog import Turn
from d2i.errors import ConfigError, ShardError
from d2i.shards import Sample, ShardReader, json_bytes, npy_bytes, write_manifest, write_shard
from tests.samples import metadata

DATA = Path(__file__).resolve().parents[2] / "made_before" / "data"
DECLARED = {
    "context": {"dtype": "bfloat16", "encoder": "clip", "shape": [2, 3]},
    "ids": {"dtype": "uint32", "encoder": "clip", "shape": [4]},
}
FINGERPRINT = {
    "format": 2,
    "arrays": DECLARED,
    "encoders": {"clip": {"sha256": "ab" * 32}},
}


def make_sample(number: int) -> Sample:
    key = f"train-{number}-0-0"
    turns = [{"speaker": None, "text": f"look {number}"}, {"speaker": 1, "text": "naïve 🙂"}]
    members = {
        "json": json_bytes(metadata(key, context=turns)),
        "context.npy": npy_bytes(np.full((2, 3), number, np.uint16)),
        "ids.npy": npy_bytes(np.arange(number, number + 4, dtype=np.uint32)),
    }
    return Sample(key, members | ({"png": b"image"} if number % 2 else {}))


@pytest.fixture(scope="module")
def declared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of format 2: three shards of five samples, and one without any."""
    directory = tmp_path_factory.mktemp("format-2")
    for index, numbers in enumerate([(0, 1), (), (2, 3), (4,)]):
        samples = map(make_sample, numbers)
        write_shard(samples, str(directory), index, failures={}, fingerprint=FINGERPRINT)
    write_manifest(str(directory), FINGERPRINT)
    return directory


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, np.ndarray):
            assert found[name].dtype == value.dtype
            np.testing.assert_array_equal(found[name], value)
        else:
            assert found[name] == value, name


def test_sample_has_key_turns_image_and_arrays() -> None:
    data, reader = d2i.Dataset(DATA, "test"), ShardReader(str(DATA / "test"))
    assert len(data) == len(reader) == 2
    assert list(data.keys) == list(reader.keys)
    sample = data[1]
    assert sample["key"] == reader.keys[1]
    assert sample["context"] == [Turn(0, "look at the green tent"), Turn(1, "")]
    assert sample["image"] == reader.read_image(1)
    arrays = reader.read([1])
    assert sample.keys() == {"key", "context", "image", *arrays}
    for name, rows in arrays.items():
        np.testing.assert_array_equal(sample[name], rows[0])
        assert (sample[name].dtype.name, sample[name].shape) == (
            data.arrays[name].dtype,
            data.arrays[name].shape,
        )
    assert_same(d2i.Dataset(str(DATA / "test"))[-1], sample)
    of_numpy: Any = np.int64(-2)
    assert_same(data[of_numpy], data[0])


def test_arrays_of_format_2_are_under_their_declared_names(declared: Path) -> None:
    data = d2i.Dataset(declared)
    samples = [data[index] for index in range(len(data))]
    assert [sample["ids"].tolist() for sample in samples] == [
        [n, n + 1, n + 2, n + 3] for n in range(5)
    ]
    assert [sample["image"] for sample in samples] == [None, b"image", None, b"image", None]
    assert samples[3]["context"] == [Turn(None, "look 3"), Turn(1, "naïve 🙂")]
    # The array of that name has the name of its member.
    np.testing.assert_array_equal(samples[3]["context.npy"], np.full((2, 3), 3, np.uint16))


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_workers_of_any_kind_read_every_sample_once(declared: Path, how: str) -> None:
    from torch.utils.data import DataLoader

    # torch's annotations ask for its own class, a DataLoader only for the methods.
    data: Any = d2i.Dataset(declared)
    before = data[0]
    loader: Any = DataLoader(
        data, 2, num_workers=2, collate_fn=list, multiprocessing_context=how, shuffle=True
    )
    found = {sample["key"]: sample for batch in loader for sample in batch}
    assert sorted(found) == sorted(data.keys)
    assert_same(found[before["key"]], before)


def test_a_pickle_reads_the_same_samples(declared: Path) -> None:
    data = d2i.Dataset(declared)
    copy = pickle.loads(pickle.dumps(data))
    for index in range(len(data)):
        assert_same(copy[index], data[index])


def test_webdataset_streams_the_samples_of_the_dataset(declared: Path) -> None:
    for url in (str(declared), f"file://{declared}"):
        stream, data = list(d2i.webdataset(url)), d2i.Dataset(declared)
        assert len(stream) == len(data)
        for found, index in zip(stream, range(len(data)), strict=True):
            assert_same(found, data[index])
    found = list(d2i.webdataset(DATA, "train"))
    assert [sample["key"] for sample in found] == list(d2i.Dataset(DATA, "train").keys)


def test_workers_share_the_tars_of_a_stream(declared: Path) -> None:
    from torch.utils.data import DataLoader

    stream = d2i.webdataset(declared).shuffle(10).batched(2, collation_fn=list)
    loader = DataLoader(stream, batch_size=None, num_workers=2)
    keys = [sample["key"] for batch in loader for sample in batch]
    assert sorted(keys) == sorted(d2i.Dataset(declared).keys)


@pytest.mark.parametrize(
    ("url", "split", "message"),
    [
        (DATA, None, "holds a directory for each split; expected one of train, test"),
        (DATA, "tset", "has no split 'tset'; expected one of train, test; give split='train'"),
        (DATA / "none", "test", "has no split 'test'; expected a directory that d2i preprocess"),
        (DATA, 3, "got the data set .* and the split 3; expected a path or a URL"),
        (None, None, "got the data set None and the split None; expected a path or a URL"),
    ],
)
def test_a_missing_split_is_one_line(url: Any, split: Any, message: str) -> None:
    for read in (d2i.Dataset, d2i.webdataset):
        with pytest.raises(ConfigError, match=message):
            read(url, split)


def test_a_directory_without_data_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"has no manifest\.json"):
        d2i.Dataset(tmp_path)


@pytest.mark.parametrize(
    ("index", "error"), [(2, IndexError), (-3, IndexError), ("0", TypeError), (1.0, TypeError)]
)
def test_a_wrong_index_names_the_data(index: Any, error: type[Exception]) -> None:
    data = d2i.Dataset(DATA, "test")
    with pytest.raises(error, match=f"index {index!r} of .*; expected"):
        data[index]


def test_damage_is_found_when_a_sample_is_read(declared: Path, tmp_path: Path) -> None:
    for path in declared.iterdir():
        shutil.copy(path, tmp_path)
    tar = next(tmp_path.glob("000002-*.tar"))
    tar.write_bytes(tar.read_bytes().replace(b"look 2", b"look 7"))
    data = d2i.Dataset(tmp_path)
    assert data[1]["key"] == "train-1-0-0"
    with pytest.raises(ShardError, match="does not match its checksum"):
        data[2]
