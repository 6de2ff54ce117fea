"""Shards that lie elsewhere: a bounded cache, fetched ahead, whole or absent, shared."""

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
from d2i.shards.local_copies import LocalCopies
from d2i.shards.write import file_info
from d2i.train.data import check_cache
from d2i.train.data_order import DataOrder
from tests.stores import NotedStore, fetched, read_all

ROOT = Path(__file__).resolve().parents[2]
NUM_SHARDS, NUM_SAMPLES = 6, 5
ORDER = DataOrder((NUM_SAMPLES,) * NUM_SHARDS, 3, "blocked", num_window_shards=2)
WAIT_S = 60.0


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six shards of five samples; sample i holds the number i."""
    return write_data(tmp_path / "store" / "data", "train")


def write_data(folder: Path, split: str) -> Path:
    for shard in range(NUM_SHARDS):
        samples = []
        for number in range(shard * NUM_SAMPLES, (shard + 1) * NUM_SAMPLES):
            clip = np.full(64, number, np.float16)
            members = {"json": json_bytes({"number": number}), "clip.npy": npy_bytes(clip)}
            samples.append(Sample(f"{split}-{number:02d}-0-0", members))
        write_shard(samples, str(folder), shard, failures={})
    write_manifest(str(folder), {})
    return folder


def bound(data: Path, num_shards: float) -> float:
    """A cache's size in GB, in shards."""
    return num_shards * max(tar.stat().st_size for tar in data.glob("*.tar")) / 1e9


def cached(cache: Path) -> set[int]:
    return {int(copy.name[:6]) for copy in cache.glob("*.d2i-tar")}


def tars(data: Path) -> list[int]:
    return [int(name[:6]) for name in fetched(data) if name.endswith(".tar")]


def is_right(batch: dict[str, NDArray[Any]], indices: NDArray[Any]) -> bool:
    return bool((batch["clip"] == indices[:, None]).all())


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_threads_read_a_set_that_is_larger_than_the_cache(data: Path, tmp_path: Path) -> None:
    size_gb = bound(data, 2.5)
    reader = ShardReader(f"noted://{data}", cache_dir=tmp_path / "cache", cache_gb=size_gb)

    def read(seed: int) -> bool:
        order = np.random.default_rng(seed).permutation(len(reader))[:8]
        reader.prefetch(np.random.default_rng(seed).permutation(NUM_SHARDS).tolist())
        return is_right(reader.read(order), order) and reader.keys[int(order[0])][6:8] == (
            f"{order[0]:02d}"
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(60)))
    assert reader.read_json(7) == {"number": 7}
    assert reader.read_members(29)["json"] == json_bytes({"number": 29})
    # Whoever opens a shard last leaves no more than the bound.
    reader.prefetch([])
    wait_until(lambda: not list((tmp_path / "cache").glob(".*.d2i-tmp")))
    for shard in range(NUM_SHARDS):
        reader.read([shard * NUM_SAMPLES])
    assert len(cached(tmp_path / "cache")) <= 2
    # An index is fetched once, whatever becomes of its tar.
    counts = Counter(name for name in fetched(data) if name.endswith(".arrow"))
    assert set(counts.values()) == {1} and len(counts) == NUM_SHARDS


def test_eviction_takes_the_least_recently_used_shard(data: Path, tmp_path: Path) -> None:
    reader = ShardReader(f"noted://{data}", cache_dir=tmp_path / "c", cache_gb=bound(data, 3))
    for shard in (0, 1, 2, 0, 3):
        reader.read([shard * NUM_SAMPLES])
    assert cached(tmp_path / "c") == {0, 2, 3}
    reader.read([0])
    assert tars(data) == [0, 1, 2, 3]
    # The next process goes on with what is there, by the same rule.
    again = ShardReader(f"noted://{data}", cache_dir=tmp_path / "c", cache_gb=bound(data, 3))
    del reader
    again.read([2 * NUM_SAMPLES, 0])
    again.read([4 * NUM_SAMPLES])
    assert tars(data) == [0, 1, 2, 3, 4]
    assert cached(tmp_path / "c") == {0, 2, 4}


def is_fetching() -> bool:
    """A copy is there a moment before its fetcher lets go of it."""
    return any(thread.name == "shard-fetcher" for thread in threading.enumerate())


def test_prefetch_fetches_what_comes_next(data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    reader = ShardReader(f"noted://{data}", cache_dir=cache, cache_gb=bound(data, 3))
    reader.prefetch([5, 1, 3, 0])
    wait_until(lambda: cached(cache) == {5, 1, 3})
    # There is no room for the last one before the first one is done with.
    indices = np.array([5, 1, 3]) * NUM_SAMPLES
    assert is_right(reader.read(indices), indices)
    assert set(tars(data)) == {5, 1, 3}
    reader.prefetch([1, 3, 0])
    wait_until(lambda: cached(cache) == {1, 3, 0} and not is_fetching())
    # What is read unforeseen takes the place of what is wanted last.
    reader.read([4 * NUM_SAMPLES])
    assert cached(cache) == {1, 3, 4}


def test_an_epoch_of_blocked_order_fetches_each_shard_once(data: Path, tmp_path: Path) -> None:
    """A cache of two windows: one that is read, and one that is fetched meanwhile."""
    reader = ShardReader(f"noted://{data}", cache_dir=tmp_path / "c", cache_gb=bound(data, 4))
    read_epoch(reader, lambda: None)
    assert_fetched_once(data)


def test_a_reader_that_idles_starves_no_other(data: Path, tmp_path: Path) -> None:
    """As that of the validation split between two validations, or one of another process."""
    cache, size_gb = tmp_path / "c", bound(data, 5.1)
    valid = write_data(tmp_path / "elsewhere" / "valid", "valid")
    idle = ShardReader(f"noted://{valid}", cache_dir=cache, cache_gb=size_gb)
    every = np.arange(len(idle))
    assert is_right(idle.read(every), every)
    assert len(list(cache.glob("*.d2i-tar"))) == 5
    reader = ShardReader(f"noted://{data}", cache_dir=cache, cache_gb=size_gb)

    def validate() -> None:
        assert is_right(idle.read(every[:1]), every[:1])
        # One more than there is room for, where both found room at once.
        assert len(list(cache.glob("*.d2i-tar"))) <= 6

    read_epoch(reader, validate)
    assert_fetched_once(data)


def test_a_failed_prefetch_is_retried(data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    reader = ShardReader(f"noted://{data}", cache_dir=cache)
    (away := tmp_path / "away").mkdir()
    for tar in data.glob("*.tar"):
        tar.rename(away / tar.name)
    reader.prefetch([0, 1, 2, 3])
    wait_until(lambda: len(tars(data)) == 4)
    for tar in away.glob("*.tar"):
        tar.rename(data / tar.name)

    def asked_again() -> bool:
        reader.prefetch([0, 1, 2, 3])
        return cached(cache) == {0, 1, 2, 3}

    wait_until(asked_again)


def test_what_had_no_room_is_fetched_once_there_is(data: Path, tmp_path: Path) -> None:
    """A slower rank holds the window before: the faster one asks for the same until it is left."""
    cache, size_gb = tmp_path / "cache", bound(data, 4)
    slower, faster = (
        ShardReader(f"noted://{data}", cache_dir=cache, cache_gb=size_gb) for _ in range(2)
    )
    slower.prefetch([0, 1, 2, 3])
    wait_until(lambda: cached(cache) == {0, 1, 2, 3})
    faster.prefetch([2, 3, 4, 5])
    slower.prefetch([2, 3])

    def asked_again() -> bool:
        faster.prefetch([2, 3, 4, 5])
        return cached(cache) == {2, 3, 4, 5}

    wait_until(asked_again)


def read_epoch(reader: ShardReader, after_step: Callable[[], None]) -> None:
    """Read an epoch as training does, two shards at a time."""
    for step in range(ORDER.num_samples // 3):
        reader.prefetch(ORDER.shards_ahead(step, 3))
        indices = ORDER.global_batch(step, 3)
        assert is_right(reader.read(indices), indices)
        after_step()


def assert_fetched_once(data: Path) -> None:
    """Of each shard, but for those of the next epoch's window, which is under way already."""
    once = set(range(NUM_SHARDS)) - set(ORDER.shards_ahead(ORDER.num_samples // 3, 3)[:2])
    counts = Counter(tars(data))
    assert set(counts) == set(range(NUM_SHARDS))
    assert all(counts[shard] == 1 for shard in once)


def test_a_cache_smaller_than_a_window_is_refused(data: Path, tmp_path: Path) -> None:
    reader = ShardReader(f"noted://{data}", cache_dir=tmp_path / "cache")
    config = load_recipe("demo").train.model_copy(
        update={"order": "blocked", "num_window_shards": 2}
    )
    check_cache(reader, None, config, bound(data, 2))
    check_cache(reader, reader, config, bound(data, 3))
    check_cache(ShardReader(str(data)), reader, config, bound(data, 1))
    with pytest.raises(ConfigError, match=r"train.num_window_shards=2, noted.* GB at once;"):
        check_cache(reader, None, config, bound(data, 1.5))
    with pytest.raises(ConfigError, match=r"at once with a validation shard; expected"):
        check_cache(reader, reader, config, bound(data, 2.9))
    with pytest.raises(ConfigError, match=r"--set train.order=blocked"):
        check_cache(reader, None, config.model_copy(update={"order": "global"}), bound(data, 5))


def test_few_of_many_shards_are_mapped_at_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps, most = Path("/proc/self/maps"), 2
    if not maps.exists():
        pytest.skip("no list of maps here")
    monkeypatch.setattr("d2i.shards.cache.max_mapped_shards", lambda: most)
    cache = tmp_path / "cache"
    reader = ShardReader(f"noted://{data}", cache_dir=cache)
    indices = np.arange(NUM_SHARDS * NUM_SAMPLES)
    for shards in (range(NUM_SHARDS), reversed(range(NUM_SHARDS)), ()):
        reader.prefetch(shards)
        assert is_right(reader.read(indices), indices)
        assert [reader.keys[i] for i in (0, 29, 12)] == [
            "train-00-0-0",
            "train-29-0-0",
            "train-12-0-0",
        ]
    mapped = [line for line in maps.read_text().splitlines() if str(cache) in line]
    assert 0 < len(mapped) <= 3 * most
    # Each was fetched once: its copy stays, as the cache has no bound.
    assert sorted(tars(data)) == list(range(NUM_SHARDS))


def test_room_is_made_without_a_look_at_the_indexes(data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    reader = ShardReader(f"noted://{data}", cache_dir=cache, cache_gb=bound(data, 2))
    reader.read(range(NUM_SHARDS * NUM_SAMPLES))
    assert len(list(cache.rglob("*.d2i-index"))) == NUM_SHARDS
    # Two tars, the claims, and the folder of all indexes that ever were fetched.
    assert len(list(cache.iterdir())) <= 4


def test_keys_need_no_tar(data: Path, tmp_path: Path) -> None:
    reader = ShardReader(f"noted://{data}", cache_dir=tmp_path / "cache")
    assert list(reader.keys) == [f"train-{n:02d}-0-0" for n in range(len(reader))]
    assert tars(data) == []


def test_a_cache_that_one_shard_overfills_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too small for noted"):
        ShardReader(f"noted://{data}", cache_dir=tmp_path, cache_gb=bound(data, 0.9))


@pytest.mark.parametrize("cache_gb", [float("nan"), float("inf"), -1.0])
def test_a_cache_of_no_size_is_refused(data: Path, tmp_path: Path, cache_gb: float) -> None:
    with pytest.raises(ConfigError, match="a cache of"):
        ShardReader(f"noted://{data}", cache_dir=tmp_path, cache_gb=cache_gb)


def test_a_folder_that_can_keep_nothing_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "taken" / ".d2i-claims").mkdir(parents=True)
    for place in ("file", "file/below", "taken"):
        with pytest.raises(
            ConfigError, match=f"cannot cache shards in .*{place} .*choose another --cache-dir"
        ):
            ShardReader(f"noted://{data}", cache_dir=tmp_path / place)


def test_a_cache_removes_nothing_but_copies(data: Path, tmp_path: Path) -> None:
    """A data set that lies in the folder of copies stays, whatever the bound."""
    cache = tmp_path / "cache"
    shutil.copytree(data, cache)
    (cache / "photos.tar").write_bytes(bytes(100_000))
    before = {path.name: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    reader = ShardReader(f"noted://{data}", cache_dir=cache, cache_gb=bound(data, 1))
    indices = np.arange(len(reader))
    assert is_right(reader.read(indices), indices)
    assert len(cached(cache)) == 1
    assert {name: (cache / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("kind", ["tar", "index"])
def test_a_copy_with_one_bit_flipped_is_fetched_again(
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
    assert is_right(again.read(indices), indices)
    assert [again.keys[int(index)][6:8] for index in indices] == [f"{i:02d}" for i in indices]
    ending = {"tar": ".tar", "index": ".arrow"}[kind]
    counts = Counter(fetched(data))
    assert {name: count for name, count in counts.items() if count > 1} == {
        name: 2 for name in counts if name.endswith(ending)
    }


def test_files_of_one_name_and_other_content_share_a_cache(tmp_path: Path) -> None:
    """As the indexes of equal tars, written by two versions of Arrow."""
    name = "000000-0123456789abcdef.arrow"
    for content in (b"one", b"two", b"one"):
        url = write_store(tmp_path / content.decode(), name, content)
        mapped = LocalCopies(url, tmp_path / "cache").map(name, file_info(content))
        assert bytes(mapped) == content
    assert len(list((tmp_path / "cache").rglob("*.d2i-index"))) == 2


def write_store(folder: Path, name: str, content: bytes) -> str:
    """Make a store of one file; give its URL."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    (folder / "data" / name).write_bytes(content)
    return f"noted://{folder / 'data'}"


def test_a_copy_that_disappears_is_fetched_beside_its_users(data: Path, tmp_path: Path) -> None:
    """In this process and another, which both have it mapped and read on."""
    cache, url, indices = tmp_path / "cache", f"noted://{data}", np.arange(30)
    first = ShardReader(url, cache_dir=cache)
    assert is_right(first.read(indices), indices)
    with start(data, cache) as other:
        assert other.stdout is not None and other.stdout.readline() == "read\n"
        for copy in cache.rglob("*.d2i-*"):
            copy.unlink()
        assert is_right(ShardReader(url, cache_dir=cache).read(indices), indices)
        with start(data, cache) as late:
            assert late.stdout is not None and late.stdout.readline() == "read\n"
            late.communicate()
        assert is_right(first.read(indices), indices)
        other.communicate()
    # Fetched once more, for all that came later.
    assert set(Counter(fetched(data)).values()) == {2}


def test_what_was_fetched_damaged_is_not_kept(data: Path, tmp_path: Path) -> None:
    tar = min(data.glob("*.tar"))
    good = tar.read_bytes()
    tar.write_bytes(good[:-1] + b"x")
    reader = ShardReader(f"noted://{data}", cache_dir=tmp_path / "cache")
    reader.prefetch([0])
    with pytest.raises(ShardError, match="does not match the sha256"):
        reader.read([0])
    assert cached(tmp_path / "cache") == set()
    tar.write_bytes(good)
    assert is_right(reader.read([0]), np.array([0]))


def start(data: Path, cache: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.stores", f"noted://{data}", str(cache), *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)


def test_a_killed_fetch_leaves_nothing_half(data: Path, tmp_path: Path) -> None:
    cache, name = tmp_path / "cache", sorted(data.glob("*.tar"))[2].name
    with start(data, cache, "--kill-at", name) as killed:
        assert killed.wait(WAIT_S) == -signal.SIGKILL
    assert cached(cache) == {0, 1}
    (remains,) = cache.glob(f".{name.removesuffix('.tar')}.*.d2i-tmp")
    assert remains.stat().st_size > 0
    # Its remains count as its shard and make room first.
    reader = ShardReader(f"noted://{data}", cache_dir=cache, cache_gb=bound(data, 1.5))
    indices = np.arange(len(reader))
    assert is_right(reader.read(indices), indices)
    assert cached(cache) == {5}
    assert list(cache.glob(".*.d2i-tmp")) == []


def test_processes_share_a_cache(data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with start(data, cache) as one, start(data, cache) as other:
        for process in (one, other):
            assert process.stdout is not None and process.stdout.readline() == "read\n"
        # Whichever came first fetched a file, for both.
        assert set(Counter(fetched(data)).values()) == {1}
        reader = ShardReader(f"noted://{data}", cache_dir=cache, cache_gb=bound(data, 1))
        indices = np.arange(len(reader))
        assert is_right(reader.read(indices), indices)
        # What others hold stays, above the bound, until they end, in whatever way.
        assert cached(cache) == set(range(NUM_SHARDS))
        one.kill()
        other.communicate()
    reader.read([0])
    assert cached(cache) == {0}


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("place", ["{data}", "noted://{data}"])
def test_other_processes_take_over_a_reader(
    data: Path, tmp_path: Path, method: str, place: str
) -> None:
    """As the workers of torch's DataLoader do, here in a cache that holds a third."""
    url, size_gb = place.format(data=data), bound(data, 2)
    reader = ShardReader(url, cache_dir=tmp_path / "cache", cache_gb=size_gb)
    indices = np.arange(len(reader))
    assert is_right(reader.read(indices), indices)
    processes, answers = of_method(method, reader, num_processes=2)
    for _ in range(3):
        assert is_right(reader.read(indices), indices)
    for _ in processes:
        numbers, keys = answers.get(timeout=WAIT_S)
        assert numbers == indices.tolist() and keys == list(reader.keys)
    for process in processes:
        process.join(WAIT_S)
        assert process.exitcode == 0


def test_a_fork_while_shards_are_fetched(data: Path, tmp_path: Path) -> None:
    """The child waits for what its parent fetches, not for threads that it does not have."""
    reader = ShardReader(f"noted://{data}", cache_dir=tmp_path / "cache")
    list(reader.keys)
    NotedStore.may_fetch.clear()
    try:
        reader.prefetch(range(NUM_SHARDS))
        wait_until(lambda: len(tars(data)) == 4)
        (process,), answers = of_method("fork", reader, num_processes=1)
    finally:
        NotedStore.may_fetch.set()
    numbers, _ = answers.get(timeout=WAIT_S)
    assert numbers == list(range(len(reader)))
    process.join(WAIT_S)
    # No tar was fetched by both.
    assert set(Counter(tars(data)).values()) == {1}


def test_a_child_keeps_no_claim_of_its_dead_parent(data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with start(data, cache, "--fork") as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "read\n"
        child = int(parent.stdout.readline())
        parent.kill()
    try:
        ShardReader(f"noted://{data}", cache_dir=cache, cache_gb=bound(data, 1)).read([0])
        assert cached(cache) == {0}
    finally:
        os.kill(child, signal.SIGKILL)


def of_method(method: str, reader: ShardReader, num_processes: int) -> tuple[list[Any], Any]:
    """Start processes that read all."""
    context: Any = multiprocessing.get_context(method)
    answers = context.Queue()
    processes = [
        context.Process(target=read_all, args=(reader, answers)) for _ in range(num_processes)
    ]
    with warnings.catch_warnings():
        # Of Python 3.12, where threads run: what forks here takes no lock of theirs.
        warnings.simplefilter("ignore", DeprecationWarning)
        for process in processes:
            process.start()
    return processes, answers
