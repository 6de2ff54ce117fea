"""Neither the number of workers nor the shard size changes a byte of a sample."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2i.cluster import Session
from d2i.preprocess.job import PreprocessRequest
from d2i.preprocess.job import preprocess as run_job
from d2i.recipes import change_recipe, resolve_recipe
from d2i.shards import ShardReader
from tests.integration.chats import encode_image
from tests.shared import needs_shared

pytestmark = needs_shared
NUM = 72


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory, settings: list[str]) -> PreprocessRequest:
    """Two dialogs for each of several distinct images."""
    directory = tmp_path_factory.mktemp("same")
    rng = np.random.default_rng(0)
    for n in range(NUM):
        pixels = rng.integers(0, 255, (70 + n % 9, 66 + n % 7, 3), np.uint8)
        (directory / f"{n}.png").write_bytes(encode_image(Image.fromarray(pixels), "PNG"))
    lines = [
        {"id": f"{who}{n}", "turns": [{"text": f"{who} sees {n}", "images": [f"{n}.png"]}]}
        for n in range(NUM)
        for who in "ab"
    ]
    (directory / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    recipe = resolve_recipe("demo", settings[1::2])
    return PreprocessRequest("jsonl", str(directory), "", recipe)


def prepare(request: PreprocessRequest, out: Path, num_samples: int, num_workers: int) -> Path:
    size = f"preprocess.num_samples_per_shard={num_samples}"
    changed = replace(request, out=str(out), recipe=change_recipe(request.recipe, [size]))
    run_job(changed, Session(num_workers), lambda _: None)
    return out / "test"


def samples(directory: Path) -> dict[str, dict[str, bytes]]:
    reader = ShardReader(str(directory))
    return {key: reader.read_members(index) for index, key in enumerate(reader.keys)}


def test_samples_do_not_depend_on_shard_size(request_: PreprocessRequest, tmp_path: Path) -> None:
    """The shard size changes which images share a batch."""
    small = prepare(request_, tmp_path / "small", 32, 0)
    large = prepare(request_, tmp_path / "large", 1000, 0)
    assert len(list(small.glob("*.tar"))) > len(list(large.glob("*.tar"))) == 1
    assert samples(small) == samples(large)
    assert len(samples(small)) == 2 * NUM


@pytest.mark.parametrize("num_workers", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_shards_do_not_depend_on_number_of_workers(
    request_: PreprocessRequest, tmp_path: Path, num_workers: int
) -> None:
    with Session(num_workers) as session:
        session.start()
        directories = [prepare(request_, tmp_path / str(n), 16, n) for n in (1, num_workers)]
    one, several = (
        {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
        for directory in directories
    )
    assert one == several
