"""Source bytes of a shard: none lost, and never all of them in memory."""

from __future__ import annotations

import io
import json
import random
import tracemalloc
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from d2i.cluster import create_shared
from d2i.dialog import ImageRef
from d2i.preprocess.encode_worker import EncodeWorkerBuilder
from d2i.preprocess.fetch.rate_limiter import create_shared_limiter
from d2i.preprocess.fetch.sources import PUBLIC_NETWORK, ImageSource, build_rate_limiter
from d2i.preprocess.fetch_worker import FetchWorkerBuilder
from d2i.preprocess.messages import ShardTask
from d2i.preprocess.plan import PlanRequest, make_plan
from d2i.preprocess.progress import Tally
from d2i.preprocess.spill_buffer import source_bytes
from d2i.recipes import change_recipe, load_recipe
from d2i.shards import ShardReader, write_manifest

NUM_PICTURES = 20
PICTURE_BYTES = 4 << 20


@given(st.dictionaries(st.text(max_size=3), st.binary()), st.randoms())
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_was_put_comes_back_in_any_order(
    tmp_path: Path, given_data: dict[str, bytes], dice: random.Random
) -> None:
    with source_bytes(str(tmp_path)) as sources:
        for name, data in given_data.items():
            sources.put(ImageRef("file", (name,)), data)
        for name in dice.sample(sorted(given_data), len(given_data)):
            assert sources.get(ImageRef("file", (name,))) == given_data[name]
        assert sources.get(ImageRef("file", ("another",))) is None
    assert not list(tmp_path.iterdir())


def write_chats(folder: Path) -> None:
    """Pictures of a few kilobytes, each filled up to some megabytes."""
    lines = []
    for number in range(NUM_PICTURES):
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64), (number, 0, 0)).save(buffer, "JPEG")
        (folder / f"{number}.jpg").write_bytes(buffer.getvalue().ljust(PICTURE_BYTES, b"\0"))
        turns = [{"text": "look", "images": [f"{number}.jpg"]}]
        lines.append(json.dumps({"id": str(number), "turns": turns}))
    (folder / "test.jsonl").write_text("\n".join(lines))


def test_the_source_bytes_of_a_shard_are_never_in_memory_together(tmp_path: Path) -> None:
    recipe = change_recipe(load_recipe("demo"), ["fetch.num_threads=1"])
    source, split_url = tmp_path / "chats", str(tmp_path / "data" / "test")
    source.mkdir()
    write_chats(source)
    make_plan(PlanRequest("jsonl", str(source), "test", recipe), split_url)
    book = create_shared_limiter(build_rate_limiter(recipe.fetch), num_workers=0)
    pictures = ImageSource(str(source), recipe.fetch, PUBLIC_NETWORK, book)
    feeder = FetchWorkerBuilder(pictures, recipe, create_shared(Tally(), num_workers=0))()
    finisher = EncodeWorkerBuilder(recipe, (split_url,))()
    task = ShardTask(split_url, 0)
    tracemalloc.start()
    result = finisher.run(task, feeder.stream(task))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.num_written == NUM_PICTURES
    # What is read ahead, a block and one sample; all of them would be 80 MiB.
    assert peak_bytes < NUM_PICTURES * PICTURE_BYTES // 2
    write_manifest(split_url, finisher.fingerprint)
    reader = ShardReader(split_url)
    for place, key in enumerate(reader.keys):
        name = key.split("-")[1]
        assert reader.read_image(place) == (source / f"{name}.jpg").read_bytes()
