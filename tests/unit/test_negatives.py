"""MMDialog's own negatives: from its release to the instances of a data set."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from d2i.errors import DataError
from d2i.eval.negatives import find_negatives
from d2i.shards import Sample, ShardReader, json_bytes, npy_bytes, write_manifest, write_shard

NUM = 5


def write_data(folder: Path) -> ShardReader:
    """Instance n shares picture `-n.jpg` in dialog n."""
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
    write_shard(samples, str(folder), 0, failures={})
    write_manifest(str(folder), {})
    return ShardReader(str(folder))


def write_corpus(folder: Path, lines: list[object]) -> str:
    (folder / "test").mkdir(parents=True)
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (folder / "test/conversations.json").write_text(text)
    return str(folder)


def record(number: int | str, keys: list[str | int]) -> dict[str, object]:
    return {
        "conversation_id": number,
        "conversation": [{"turn": [{"__TEXT__": "look"}]}],
        "negative_candidate_media_keys": keys,
        "negative_candidate_texts": ["not read"],
    }


def test_what_is_listed_and_in_the_data(tmp_path: Path) -> None:
    lines = [
        # Its own picture is no negative, and one that could not be fetched is not in the data.
        record(0, ["-1", "-3", "-0", "77"]),
        record("1", [-2]),
        {"conversation_id": 2, "conversation": []},
        "no record",
        record(9, ["-4"]),
    ]
    found = find_negatives(write_data(tmp_path / "data"), write_corpus(tmp_path / "corpus", lines))
    assert [listed.tolist() for listed in found.of_instances] == [[1, 3], [2], [], [], []]
    assert found.mean_number == pytest.approx(3 / NUM)


def test_another_corpus_is_refused(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    other = write_corpus(tmp_path / "other", [record(0, ["12"])])
    with pytest.raises(DataError, match="no image that it lists is in"):
        find_negatives(data, other)
    with pytest.raises(DataError, match="holds no test split of MMDialog"):
        find_negatives(data, str(tmp_path / "nothing"))
