"""Cache of remote shards: bounded, prefetched, atomic, shared between processes."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from d2i.errors import ConfigError, ShardError
from d2i.recipes import load_recipe
from d2i.shards import Sample, ShardReader, json_bytes, npy_bytes, write_manifest, write_shard
from d2i.shards.cache.local_copies import LocalCopies
from d2i.shards.writer import file_info
from d2i.train.data.data_order import DataOrder
from d2i.train.data.loader import check_cache
from tests.stores import NotedStore, fetched, read_all

ROOT = Path(__file__).resolve().parents[4]
NUM_SHARDS, NUM_SAMPLES = 6, 5
ORDER = DataOrder((NUM_SAMPLES,) * NUM_SHARDS, 3, "blocked", num_window_shards=2)
WAIT_S = 60.0


FORMAT_2 = {
    "format": 2,
    "arrays": {"clip": {"dtype": "float16", "shape": [64], "encoder": "clip_image"}},
    "encoders": {"clip_image": {"sha256": "0" * 64}},
}


@pytest.fixture
def data(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Write six shards of five samples; sample i holds the number i."""
    return write_data(tmp_path / "store" / "data", "train", getattr(request, "param", {}))


def write_data(directory: Path, split: str, fingerprint: dict[str, Any] | None = None) -> Path:
    made_by = fingerprint or {}
    for shard in range(NUM_SHARDS):
        samples = []
        for number in range(shard * NUM_SAMPLES, (shard + 1) * NUM_SAMPLES):
            clip = np.full(64, number, np.float16)
            members = {"json": json_bytes({"number": number}), "clip.npy": npy_bytes(clip)}
            samples.append(Sample(f"{split}-{number:02d}-0-0", members))
        write_shard(samples, str(directory), shard, failures={}, fingerprint=made_by)
    write_manifest(str(directory), made_by)
    return directory


def cache_gb_of(data: Path, num_shards: float) -> float:
    """Return the size in GB of a cache that holds a number of shards."""
    return num_shards * max(tar.stat().st_size for tar in data.glob("*.tar")) / 1e9


def cached_shards(cache: Path) -> set[int]:
    return {int(copy.name[:6]) for copy in cache.glob("*.d2i-tar")}


def fetched_shards(data: Path) -> list[int]:
    return [int(name[:6]) for name in fetched(data) if name.endswith(".tar")]


def is_correct(batch: dict[str, NDArray[Any]], indices: NDArray[Any]) -> bool:
    return bool((batch["clip"] == indices[:, None]).all())


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@pytest.mark.parametrize("data", [{}, FORMAT_2], indirect=True, ids=["format 1", "format 2"])
def test_threads_read_data_set_larger_than_cache(data: Path, tmp_path: Path) -> None:
    size_gb = cache_gb_of(data, 2.5)
    reader = ShardReader(f"noted://{data}", cache_dir=tmp_path / "cache", cache_gb=size_gb)

    def read(seed: int) -> bool:
        order = np.random.default_rng(seed).permutation(len(reader))[:8]
        reader.prefetch(np.random.default_rng(seed).permutation(NUM_SHARDS).tolist())
        return is_correct(reader.read(order), order) and reader.keys[int(order[0])][6:8] == (
            f"{order[0]:02d}"
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(60)))
    assert reader.read_json(7) == {"number": 7}
    assert reader.read_members(29)["json"] == json_bytes({"number": 29})
    # After the last read the cache is within its limit.
    reader.prefetch([])
    wait_until(lambda: not list((tmp_path / "cache").glob(".*.d2i-tmp")))
    for shard in range(NUM_SHARDS):
        reader.read([shard * NUM_SAMPLES])
    assert len(cached_shards(tmp_path / "cache")) <= 2
    # An index is fetched once, even if its tar is evicted.
    counts = Counter(name for name in fetched(data) if name.endswith(".arrow"))
    assert set(counts.values()) == {1} and len(counts) == NUM_SHARDS


def test_eviction_takes_the_least_recently_used_shard(data: Path, tmp_path: Path) -> None:
    reader = ShardReader(f"noted://{data}", cache_dir=tmp_path / "c", cache_gb=cache_gb_of(data, 3))
    for shard in (0, 1, 2, 0, 3):
        reader.read([shard * NUM_SAMPLES])
    assert cached_shards(tmp_path / "c") == {0, 2, 3}
    reader.read([0])
    assert fetched_shards(data) == [0, 1, 2, 3]
    # The next reader reuses the copies, and evicts by the same rule.
    again = ShardReader(f"noted://{data}", cache_dir=tmp_path / "c", cache_gb=cache_gb_of(data, 3))
    del reader
    again.read([2 * NUM_SAMPLES, 0])
    again.read([4 * NUM_SAMPLES])
    assert fetched_shards(data) == [0, 1, 2, 3, 4]
    assert cached_shards(tmp_path / "c") == {0, 2, 4}


def is_fetching() -> bool:
    """Return whether a fetcher runs; it releases a copy a moment after the copy appears."""
    return any(thread.name == "shard-fetcher" for thread in threading.enumerate())


def test_prefetch_fetches_next_shards(data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    reader = ShardReader(f"noted://{data}", cache_dir=cache, cache_gb=cache_gb_of(data, 3))
    reader.prefetch([5, 1, 3, 0])
    wait_until(lambda: cached_shards(cache) == {5, 1, 3})
    # There is no room for the last one until the first one is released.
    indices = np.array([5, 1, 3]) * NUM_SAMPLES
    assert is_correct(reader.read(indices), indices)
    assert set(fetched_shards(data)) == {5, 1, 3}
    reader.prefetch([1, 3, 0])
    wait_until(lambda: cached_shards(cache) == {1, 3, 0} and not is_fetching())
    # A shard read outside the prefetch window evicts the one needed last.
    reader.read([4 * NUM_SAMPLES])
    assert cached_shards(cache) == {1, 3, 4}


def test_blocked_data_order_fetches_each_shard_once_per_epoch(data: Path, tmp_path: Path) -> None:
    """The cache holds two windows: one is read while the next is prefetched."""
    reader = ShardReader(f"noted://{data}", cache_dir=tmp_path / "c", cache_gb=cache_gb_of(data, 4))
    read_epoch(reader, lambda: None)
    assert_fetched_once(data)


def test_idle_reader_does_not_starve_other_reader(data: Path, tmp_path: Path) -> None:
    """Idle readers: that of the validation split between validations, or one of another process."""
    cache, size_gb = tmp_path / "c", cache_gb_of(data, 5.1)
    valid = write_data(tmp_path / "elsewhere" / "valid", "valid")
    idle = ShardReader(f"noted://{valid}", cache_dir=cache, cache_gb=size_gb)
    every = np.arange(len(idle))
    assert is_correct(idle.read(every), every)
    assert len(list(cache.glob("*.d2i-tar"))) == 5
    reader = ShardReader(f"noted://{data}", cache_dir=cache, cache_gb=size_gb)

    def validate() -> None:
        assert is_correct(idle.read(every[:1]), every[:1])
        # One more than the limit, if both readers found room at the same time.
        assert len(list(cache.glob("*.d2i-tar"))) <= 6

    read_epoch(reader, validate)
    assert_fetched_once(data)


def test_failed_prefetch_is_retried(data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    reader = ShardReader(f"noted://{data}", cache_dir=cache)
    (away := tmp_path / "away").mkdir()
    for tar in data.glob("*.tar"):
        tar.rename(away / tar.name)
    reader.prefetch([0, 1, 2, 3])
    wait_until(lambda: len(fetched_shards(data)) == 4)
    for tar in away.glob("*.tar"):
        tar.rename(data / tar.name)

    def prefetch_again() -> bool:
        reader.prefetch([0, 1, 2, 3])
        return cached_shards(cache) == {0, 1, 2, 3}

    wait_until(prefetch_again)


def test_prefetch_waits_for_room_in_cache(data: Path, tmp_path: Path) -> None:
    """A slower rank holds the previous window; the faster one prefetches again until it is free."""
    cache, size_gb = tmp_path / "cache", cache_gb_of(data, 4)
    slower, faster = (
        ShardReader(f"noted://{data}", cache_dir=cache, cache_gb=size_gb) for _ in range(2)
    )
    slower.prefetch([0, 1, 2, 3])
    wait_until(lambda: cached_shards(cache) == {0, 1, 2, 3})
    faster.prefetch([2, 3, 4, 5])
    slower.prefetch([2, 3])

    def prefetch_again() -> bool:
        faster.prefetch([2, 3, 4, 5])
        return cached_shards(cache) == {2, 3, 4, 5}

    wait_until(prefetch_again)


def read_epoch(reader: ShardReader, after_step: Callable[[], None]) -> None:
    """Read an epoch as the training loop does, two shards at a time."""
    for step in range(ORDER.num_samples // 3):
        reader.prefetch(ORDER.shards_ahead(step, 3))
        indices = ORDER.global_batch(step, 3)
        assert is_correct(reader.read(indices), indices)
        after_step()


def assert_fetched_once(data: Path) -> None:
    """Check all shards but those of the next epoch's window, whose prefetch has begun."""
    once = set(range(NUM_SHARDS)) - set(ORDER.shards_ahead(ORDER.num_samples // 3, 3)[:2])
    counts = Counter(fetched_shards(data))
    assert set(counts) == set(range(NUM_SHARDS))
    assert all(counts[shard] == 1 for shard in once)


def test_cache_smaller_than_window_is_rejected(data: Path, tmp_path: Path) -> None:
    reader = ShardReader(f"noted://{data}", cache_dir=tmp_path / "cache")
    config = load_recipe("demo").train.model_copy(
        update={"order": "blocked", "num_window_shards": 2}
    )
    check_cache(reader, None, config, cache_gb_of(data, 2))
    check_cache(reader, reader, config, cache_gb_of(data, 3))
    check_cache(ShardReader(str(data)), reader, config, cache_gb_of(data, 1))
    with pytest.raises(ConfigError, match=r"train.num_window_shards=2, noted.* GB at once;"):
        check_cache(reader, None, config, cache_gb_of(data, 1.5))
    with pytest.raises(ConfigError, match=r"at once with a validation shard; expected"):
        check_cache(reader, reader, config, cache_gb_of(data, 2.9))
    with pytest.raises(ConfigError, match=r"--set train.order=blocked"):
        check_cache(
            reader, None, config.model_copy(update={"order": "global"}), cache_gb_of(data, 5)
        )


def test_max_mapped_shards_limits_open_maps(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps, max_mapped = Path("/proc/self/maps"), 2
    if not maps.exists():
        pytest.skip("no list of maps here")
    monkeypatch.setattr("d2i.shards.cache.shard_cache.max_mapped_shards", lambda: max_mapped)
    cache = tmp_path / "cache"
    reader = ShardReader(f"noted://{data}", cache_dir=cache)
    indices = np.arange(NUM_SHARDS * NUM_SAMPLES)
    for shards in (range(NUM_SHARDS), reversed(range(NUM_SHARDS)), ()):
        reader.prefetch(shards)
        assert is_correct(reader.read(indices), indices)
        assert [reader.keys[i] for i in (0, 29, 12)] == [
            "train-00-0-0",
            "train-29-0-0",
            "train-12-0-0",
        ]
    mapped = [line for line in maps.read_text().splitlines() if str(cache) in line]
    assert 0 < len(mapped) <= 3 * max_mapped
    # Each was fetched once: its copy stays, as the cache has no limit.
    assert sorted(fetched_shards(data)) == list(range(NUM_SHARDS))


def test_eviction_does_not_list_indexes(data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    reader = ShardReader(f"noted://{data}", cache_dir=cache, cache_gb=cache_gb_of(data, 2))
    reader.read(range(NUM_SHARDS * NUM_SAMPLES))
    assert len(list(cache.rglob("*.d2i-index"))) == NUM_SHARDS
    # Two tars, the leases, and the directory of all indexes fetched so far.
    assert len(list(cache.iterdir())) <= 4


def test_keys_are_read_without_fetching_tars(data: Path, tmp_path: Path) -> None:
    reader = ShardReader(f"noted://{data}", cache_dir=tmp_path / "cache")
    assert list(reader.keys) == [f"train-{n:02d}-0-0" for n in range(len(reader))]
    assert fetched_shards(data) == []


def test_cache_smaller_than_one_shard_is_rejected(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too small for noted"):
        ShardReader(f"noted://{data}", cache_dir=tmp_path, cache_gb=cache_gb_of(data, 0.9))


@pytest.mark.parametrize("cache_gb", [float("nan"), float("inf"), -1.0])
def test_invalid_cache_size_is_rejected(data: Path, tmp_path: Path, cache_gb: float) -> None:
    with pytest.raises(ConfigError, match="a cache of"):
        ShardReader(f"noted://{data}", cache_dir=tmp_path, cache_gb=cache_gb)


def test_unusable_cache_directory_is_rejected(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "taken" / ".d2i-claims").mkdir(parents=True)
    for name in ("file", "file/below", "taken"):
        with pytest.raises(ConfigError, match=f"{name} .* choose another --cache-dir"):
            ShardReader(f"noted://{data}", cache_dir=tmp_path / name)


def test_eviction_removes_only_cached_copies(data: Path, tmp_path: Path) -> None:
    """A data set in the cache directory is kept, whatever the limit."""
    cache = tmp_path / "cache"
    shutil.copytree(data, cache)
    (cache / "photos.tar").write_bytes(bytes(100_000))
    before = {path.name: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    reader = ShardReader(f"noted://{data}", cache_dir=cache, cache_gb=cache_gb_of(data, 1))
    indices = np.arange(len(reader))
    assert is_correct(reader.read(indices), indices)
    assert len(cached_shards(cache)) == 1
    assert {name: (cache / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("kind", ["tar", "index"])
def test_cached_copy_with_flipped_bit_is_fetched_again(
    data: Path, tmp_path: Path, kind: str
) -> None:
    cache, indices = tmp_path / "cache", np.arange(NUM_SHARDS * NUM_SAMPLES)
    url = f"noted://{data}"
    ShardReader(url, cache_dir=cache).read(indices)
    for number, copy in enumerate(sorted(cache.rglob(f"*.d2i-{kind}"))):
        content = bytearray(copy.read_bytes())
        content[number * len(content) // NUM_SHARDS] ^= 1
        copy.write_bytes(content)
    again = ShardReader(url, cache_dir=cache)
    assert is_correct(again.read(indices), indices)
    assert [again.keys[int(index)][6:8] for index in indices] == [f"{i:02d}" for i in indices]
    suffix = {"tar": ".tar", "index": ".arrow"}[kind]
    counts = Counter(fetched(data))
    assert {name: count for name, count in counts.items() if count > 1} == {
        name: 2 for name in counts if name.endswith(suffix)
    }


def test_same_named_files_with_other_content_share_cache(tmp_path: Path) -> None:
    """For example the indexes of equal tars, written by two versions of Arrow."""
    name = "000000-0123456789abcdef.arrow"
    for content in (b"one", b"two", b"one"):
        url = write_store(tmp_path / content.decode(), name, content)
        mapped = LocalCopies(url, tmp_path / "cache").map(name, file_info(content))
        assert bytes(mapped) == content
    assert len(list((tmp_path / "cache").rglob("*.d2i-index"))) == 2


def write_store(directory: Path, name: str, content: bytes) -> str:
    """Make a store of one file and return its URL."""
    (directory / "data").mkdir(parents=True, exist_ok=True)
    (directory / "data" / name).write_bytes(content)
    return f"noted://{directory / 'data'}"


def test_deleted_copy_is_fetched_again_while_mapped(data: Path, tmp_path: Path) -> None:
    """This process and another have it mapped, and continue to read."""
    cache, url, indices = tmp_path / "cache", f"noted://{data}", np.arange(30)
    first = ShardReader(url, cache_dir=cache)
    assert is_correct(first.read(indices), indices)
    with start(data, cache) as other:
        assert other.stdout is not None and other.stdout.readline() == "read\n"
        for copy in cache.rglob("*.d2i-*"):
            copy.unlink()
        assert is_correct(ShardReader(url, cache_dir=cache).read(indices), indices)
        with start(data, cache) as late:
            assert late.stdout is not None and late.stdout.readline() == "read\n"
            late.communicate()
        assert is_correct(first.read(indices), indices)
        other.communicate()
    # Fetched once more, for all later readers.
    assert set(Counter(fetched(data)).values()) == {2}


def test_damaged_download_is_not_cached(data: Path, tmp_path: Path) -> None:
    tar = min(data.glob("*.tar"))
    good = tar.read_bytes()
    tar.write_bytes(good[:-1] + b"x")
    reader = ShardReader(f"noted://{data}", cache_dir=tmp_path / "cache")
    reader.prefetch([0])
    with pytest.raises(ShardError, match="does not match the sha256"):
        reader.read([0])
    assert cached_shards(tmp_path / "cache") == set()
    tar.write_bytes(good)
    assert is_correct(reader.read([0]), np.array([0]))


def start(data: Path, cache: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.stores", f"noted://{data}", str(cache), *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)


def test_killed_fetch_leaves_no_partial_copy(data: Path, tmp_path: Path) -> None:
    cache, name = tmp_path / "cache", sorted(data.glob("*.tar"))[2].name
    with start(data, cache, "--kill-at", name) as killed:
        assert killed.wait(WAIT_S) == -signal.SIGKILL
    assert cached_shards(cache) == {0, 1}
    (temp_file,) = cache.glob(f".{name.removesuffix('.tar')}.*.d2i-tmp")
    assert temp_file.stat().st_size > 0
    # A temporary file counts towards the limit and is evicted first.
    reader = ShardReader(f"noted://{data}", cache_dir=cache, cache_gb=cache_gb_of(data, 1.5))
    indices = np.arange(len(reader))
    assert is_correct(reader.read(indices), indices)
    assert cached_shards(cache) == {5}
    assert list(cache.glob(".*.d2i-tmp")) == []


def test_processes_share_cache(data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with start(data, cache) as one, start(data, cache) as other:
        for process in (one, other):
            assert process.stdout is not None and process.stdout.readline() == "read\n"
        # The first process fetched each file for both.
        assert set(Counter(fetched(data)).values()) == {1}
        reader = ShardReader(f"noted://{data}", cache_dir=cache, cache_gb=cache_gb_of(data, 1))
        indices = np.arange(len(reader))
        assert is_correct(reader.read(indices), indices)
        # Copies leased by other processes stay, above the limit, until these exit or are killed.
        assert cached_shards(cache) == set(range(NUM_SHARDS))
        one.kill()
        other.communicate()
    reader.read([0])
    assert cached_shards(cache) == {0}


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("url_format", ["{data}", "noted://{data}"])
def test_reader_works_in_forked_and_spawned_processes(
    data: Path, tmp_path: Path, method: str, url_format: str
) -> None:
    """As workers of torch's DataLoader do, here with a cache for a third of the data."""
    url, size_gb = url_format.format(data=data), cache_gb_of(data, 2)
    reader = ShardReader(url, cache_dir=tmp_path / "cache", cache_gb=size_gb)
    indices = np.arange(len(reader))
    assert is_correct(reader.read(indices), indices)
    processes, results = start_readers(method, reader, num_processes=2)
    for _ in range(3):
        assert is_correct(reader.read(indices), indices)
    for _ in processes:
        numbers, keys = results.get(timeout=WAIT_S)
        assert numbers == indices.tolist() and keys == list(reader.keys)
    for process in processes:
        process.join(WAIT_S)
        assert process.exitcode == 0


def test_fork_during_prefetch_does_not_deadlock(data: Path, tmp_path: Path) -> None:
    """The child waits for the files that its parent fetches, not for threads lost in the fork."""
    reader = ShardReader(f"noted://{data}", cache_dir=tmp_path / "cache")
    list(reader.keys)
    NotedStore.may_fetch.clear()
    try:
        reader.prefetch(range(NUM_SHARDS))
        wait_until(lambda: len(fetched_shards(data)) == 4)
        (process,), results = start_readers("fork", reader, num_processes=1)
    finally:
        NotedStore.may_fetch.set()
    numbers, _ = results.get(timeout=WAIT_S)
    assert numbers == list(range(len(reader)))
    process.join(WAIT_S)
    # Parent and child fetched no tar twice.
    assert set(Counter(fetched_shards(data)).values()) == {1}


def test_child_holds_no_lease_of_dead_parent(data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with start(data, cache, "--fork") as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "read\n"
        child = int(parent.stdout.readline())
        parent.kill()
    try:
        ShardReader(f"noted://{data}", cache_dir=cache, cache_gb=cache_gb_of(data, 1)).read([0])
        assert cached_shards(cache) == {0}
    finally:
        os.kill(child, signal.SIGKILL)


def start_readers(method: str, reader: ShardReader, num_processes: int) -> tuple[list[Any], Any]:
    """Start processes that read everything with one reader."""
    context: Any = multiprocessing.get_context(method)
    results = context.Queue()
    processes = [
        context.Process(target=read_all, args=(reader, results)) for _ in range(num_processes)
    ]
    with warnings.catch_warnings():
        # Python 3.12 warns of a fork while threads run; the forked code takes none of their locks.
        warnings.simplefilter("ignore", DeprecationWarning)
        for process in processes:
            process.start()
    return processes, results
