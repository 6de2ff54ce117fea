"""MMDialog's published negatives, matched to the instances of a data set."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from d2i.corpora.mmdialog import MMDialog
from d2i.corpora.photochat import PhotoChat
from d2i.errors import ConfigError, DataError
from d2i.eval.metrics.negatives import find_negatives
from d2i.shards import Sample, ShardReader, json_bytes, npy_bytes, write_manifest, write_shard

NUM = 5


def write_data(directory: Path) -> ShardReader:
    """Write instances: number n shares image `-n.jpg` in dialog n."""
    samples = [
        Sample(
            f"test-{number}-0-0",
            {
                "json": json_bytes(
                    {
                        "dialog_id": str(number),
                        "split": "test",
                        "source": {"ref": [f"test/-{number}.jpg"]},
                    }
                ),
                "moments.npy": npy_bytes(np.zeros((8, 2, 2), np.float16)),
            },
        )
        for number in range(NUM)
    ]
    write_shard(samples, str(directory), 0, failures={})
    write_manifest(str(directory), {})
    return ShardReader(str(directory))


def write_corpus(directory: Path, lines: list[object]) -> str:
    (directory / "test").mkdir(parents=True)
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (directory / "test/conversations.json").write_text(text)
    return str(directory)


def record(number: int | str, keys: list[str | int]) -> dict[str, object]:
    return {
        "conversation_id": number,
        "conversation": [{"turn": [{"__TEXT__": "look"}]}],
        "negative_candidate_media_keys": keys,
        "negative_candidate_texts": ["not read"],
    }


def test_find_negatives_keeps_listed_images_of_data_set(tmp_path: Path) -> None:
    lines = [
        # Its own image is no negative, and an image that was not fetched is not in the data.
        record(0, ["-1", "-3", "-0", "77"]),
        record("1", [-2]),
        {"conversation_id": 2, "conversation": []},
        "no record",
        record(9, ["-4"]),
    ]
    corpus = write_corpus(tmp_path / "corpus", lines)
    found = find_negatives(write_data(tmp_path / "data"), MMDialog(), corpus)
    assert [listed.tolist() for listed in found.of_instances] == [[1, 3], [2], [], [], []]
    assert found.mean_number == pytest.approx(3 / NUM)


def test_find_negatives_rejects_other_corpus(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    other = write_corpus(tmp_path / "other", [record(0, ["12"])])
    with pytest.raises(DataError, match="no image that it lists is in"):
        find_negatives(data, MMDialog(), other)
    with pytest.raises(DataError, match="holds no test split of MMDialog"):
        find_negatives(data, MMDialog(), str(tmp_path / "nothing"))


def test_find_negatives_rejects_corpus_without_any(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="PhotoChat lists no negative candidates"):
        find_negatives(write_data(tmp_path / "data"), PhotoChat(), str(tmp_path))
