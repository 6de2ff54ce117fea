"""Detection of damaged shards by webdataset, by `d2i verify` and by d2i's reader.

Writes one data set, damages a copy of it in each way, and prints one JSON line: for each damage the
number of samples that webdataset returns with its default and with its warning handler, whether it
raises, and what `d2i verify` and `ShardReader` report.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import tarfile
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from d2i.errors import ShardError
from d2i.shards import (
    Sample,
    ShardReader,
    json_bytes,
    npy_bytes,
    read_manifest,
    verify,
    write_manifest,
    write_shard,
)

NUM_SHARDS = 2


def make_data(directory: Path, num_samples: int) -> None:
    """Write a data set of two shards with random features."""
    random = np.random.default_rng(0)
    for index in range(NUM_SHARDS):
        samples = [
            Sample(
                f"train-{index}-{number}-0",
                {
                    "json": json_bytes(metadata(f"train-{index}-{number}-0")),
                    "moments.npy": npy_bytes(random.normal(size=(8, 8, 8)).astype(np.float16)),
                    "clip.npy": npy_bytes(random.normal(size=64).astype(np.float16)),
                    "tokens.npy": npy_bytes(random.integers(0, 49408, 77).astype(np.uint16)),
                },
            )
            for number in range(num_samples // NUM_SHARDS)
        ]
        write_shard(samples, str(directory), index, failures={})
    write_manifest(str(directory), {})


def metadata(key: str) -> dict[str, Any]:
    """Return all fields that a sample's JSON member must hold."""
    source = {"ref": ["a.jpg"], "sha256": "0" * 64, "size_bytes": 1, "width": 1, "height": 1}
    names = {"key": key, "split": "train", "dialog_id": "0", "turn": 1, "image": 0}
    texts = {"description": None, "description_by": None, "labels": [], "direction": "answer"}
    return {**names, **texts, "context": [{"speaker": 0, "text": "look"}], "source": source}


def tars(directory: Path) -> list[Path]:
    """Return the tars in order."""
    return sorted(directory.glob("*.tar"))


def members(path: Path, suffix: str) -> list[tarfile.TarInfo]:
    """Return the members of a kind, in order."""
    with tarfile.open(path) as file:
        return [member for member in file.getmembers() if member.name.endswith(suffix)]


def cut(path: Path, length: int) -> None:
    """Keep the first bytes of a file."""
    os.truncate(path, length)


def cut_at_a_sample(directory: Path) -> None:
    """Cut where the second half of a shard's samples begins."""
    found = members(tars(directory)[0], ".json")
    cut(tars(directory)[0], found[len(found) // 2].offset)


def cut_in_a_member(directory: Path) -> None:
    """Cut in the middle of an array."""
    found = members(tars(directory)[0], "moments.npy")
    cut(tars(directory)[0], found[len(found) // 2].offset_data + 200)


def flip_a_bit(directory: Path) -> None:
    """Flip one bit of one number."""
    path = tars(directory)[0]
    content = bytearray(path.read_bytes())
    content[members(path, "moments.npy")[3].offset_data + 200] ^= 1
    path.write_bytes(content)


def swap_shards(directory: Path) -> None:
    """Swap the names of two tars."""
    one, two = tars(directory)
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)


def lose_a_shard(directory: Path) -> None:
    """Remove a tar."""
    tars(directory)[1].unlink()


DAMAGE: dict[str, Callable[[Path], None]] = {
    "nothing": lambda _: None,
    "cut at a sample": cut_at_a_sample,
    "cut inside a member": cut_in_a_member,
    "one bit flipped": flip_a_bit,
    "two shards swapped": swap_shards,
    "a shard missing": lose_a_shard,
}


def read_webdataset(directory: Path, *, warn: bool) -> dict[str, Any]:
    """Read the directory with webdataset; return the number of samples and the error."""
    import webdataset

    handler = webdataset.warn_and_continue if warn else webdataset.reraise_exception
    num_read = 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = webdataset.WebDataset(
                [str(path) for path in tars(directory)], shardshuffle=False, handler=handler
            ).decode(handler=handler)
            for _ in data:
                num_read += 1
    except Exception as err:
        return {"samples": num_read, "error": type(err).__name__}
    return {"samples": num_read, "error": None}


def read_d2i(directory: Path) -> str | None:
    """Read every sample as training does; return the error, if any."""
    try:
        reader = ShardReader(str(directory))
        reader.read(range(len(reader)))
    except ShardError as err:
        return str(err).replace(str(directory), "DATA")
    return None


def main() -> None:
    """Damage copies, read them, and print the line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--num-samples", type=int, default=600)
    args = parser.parse_args()
    os.environ["WDS_SECURE"] = "1"
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        good = Path(scratch, "good")
        make_data(good, args.num_samples)
        for name, damage in DAMAGE.items():
            directory = Path(shutil.copytree(good, Path(scratch, name)))
            damage(directory)
            found[name] = {
                "webdataset": read_webdataset(directory, warn=False),
                "webdataset_warning": read_webdataset(directory, warn=True),
                "d2i_verify": sorted({p.reason for p in verify(str(directory)).problems}),
                "d2i_reader": read_d2i(directory),
            }
        expected = read_manifest(str(good)).num_samples
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    print(
        json.dumps(
            {"benchmark": "corruption", "num_samples": expected, **found, "machine": machine}
        )
    )


if __name__ == "__main__":
    main()
