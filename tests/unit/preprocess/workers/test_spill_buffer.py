"""SpillBuffer keeps the source bytes of a shard: none lost, and never all in memory."""

from __future__ import annotations

import io
import json
import random
import tracemalloc
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from d2i.cluster import Session
from d2i.dialog import ImageRef
from d2i.fetch.rate_limiter import create_shared_limiter
from d2i.fetch.sources import PUBLIC_NETWORK, ImageSource, build_rate_limiter
from d2i.preprocess.plan.planner import PlanRequest, make_plan
from d2i.preprocess.progress import Tally
from d2i.preprocess.workers.encode_worker import EncodeWorkerBuilder
from d2i.preprocess.workers.fetch_worker import FetchWorkerBuilder
from d2i.preprocess.workers.messages import ShardTask
from d2i.preprocess.workers.spill_buffer import source_bytes
from d2i.recipes import change_recipe, load_recipe
from d2i.shards import ShardReader, write_manifest

NUM_IMAGES = 20
IMAGE_BYTES = 4 << 20


@given(st.dictionaries(st.text(max_size=3), st.binary()), st.randoms())
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_spill_buffer_returns_bytes_in_any_order(
    tmp_path: Path, given_data: dict[str, bytes], rng: random.Random
) -> None:
    with source_bytes(str(tmp_path)) as sources:
        for name, data in given_data.items():
            sources.put(ImageRef("file", (name,)), data)
        for name in rng.sample(sorted(given_data), len(given_data)):
            assert sources.get(ImageRef("file", (name,))) == given_data[name]
        assert sources.get(ImageRef("file", ("another",))) is None
    assert not list(tmp_path.iterdir())


def write_chats(directory: Path) -> None:
    """Write images of a few kilobytes, each padded to several megabytes."""
    lines = []
    for number in range(NUM_IMAGES):
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64), (number, 0, 0)).save(buffer, "JPEG")
        (directory / f"{number}.jpg").write_bytes(buffer.getvalue().ljust(IMAGE_BYTES, b"\0"))
        turns = [{"text": "look", "images": [f"{number}.jpg"]}]
        lines.append(json.dumps({"id": str(number), "turns": turns}))
    (directory / "test.jsonl").write_text("\n".join(lines))


def test_spill_buffer_bounds_memory_of_shard(tmp_path: Path) -> None:
    recipe = change_recipe(load_recipe("demo"), ["fetch.num_threads=1"])
    source, split_url = tmp_path / "chats", str(tmp_path / "data" / "test")
    source.mkdir()
    write_chats(source)
    make_plan(PlanRequest("jsonl", str(source), "test", recipe), split_url)
    limiter = create_shared_limiter(build_rate_limiter(recipe.fetch), Session(0))
    image_source = ImageSource(str(source), recipe.fetch, PUBLIC_NETWORK, limiter)
    producer = FetchWorkerBuilder(image_source, recipe, Session(0).shared(Tally()))()
    consumer = EncodeWorkerBuilder(recipe, (split_url,))()
    task = ShardTask(split_url, 0)
    tracemalloc.start()
    result = consumer.run(task, producer.stream(task))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.num_written == NUM_IMAGES
    # The prefetched bytes, a block and one sample; all images would be 80 MiB.
    assert peak_bytes < NUM_IMAGES * IMAGE_BYTES // 2
    write_manifest(split_url, consumer.fingerprint)
    reader = ShardReader(split_url)
    for index, key in enumerate(reader.keys):
        name = key.split("-")[1]
        assert reader.read_image(index) == (source / f"{name}.jpg").read_bytes()
