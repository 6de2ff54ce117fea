"""A plan puts the same instances into the same shards, in whatever order the corpus is read."""

from __future__ import annotations

import heapq
import itertools
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2i.config import Recipe, apply_settings
from d2i.dialog import ImageRef, Instance, Turn, key_order_hash
from d2i.errors import ConfigError, DataError
from d2i.io import storage
from d2i.preprocess.plan import hash_partition
from d2i.preprocess.plan.exclude import read_exclusion
from d2i.preprocess.plan.planner import (
    PlanRequest,
    _batches,
    make_plan,
    records_url,
)
from d2i.preprocess.plan.record_files import read_records, records_table, write_records
from d2i.preprocess.plan.selection import SmallestRankSampler
from d2i.recipes import load_recipe

NUM_DIALOGS, NUM_IMAGES = 120, 90


def write_dialogs(directory: Path, *, order: int | None = None, form: str = "lines") -> str:
    """Write a corpus whose images occur several times, its records in a seeded order."""
    rng = random.Random(0)
    records = [
        {
            "conversation_id": number,
            "conversation": [
                {"turn": [{"__TEXT__": f"say {number}"}, {"__MEDIA__": str(image_id)}]}
                for image_id in rng.choices(range(NUM_IMAGES), k=rng.randint(1, 4))
            ],
        }
        for number in range(NUM_DIALOGS)
    ]
    if order is not None:
        random.Random(order).shuffle(records)
    path = directory / "train" / "conversations.json"
    path.parent.mkdir(parents=True)
    lines = "\n".join(map(json.dumps, records))
    path.write_text(lines if form == "lines" else json.dumps(records, indent=1))
    return str(directory)


def recipe(*settings: str) -> Recipe:
    return apply_settings(load_recipe("uvit-s-mmdialog"), settings)


def make_and_read_plan(
    source: str, out: Path, *settings: str, **request: object
) -> list[list[Instance]]:
    """Make a plan, and read the records of its shards back."""
    plan = make_plan(
        PlanRequest("mmdialog", source, "train", recipe(*settings), **request),  # type: ignore[arg-type]
        str(out),
    )
    shards = [
        read_records(records_url(str(out), index), plan.sha256(index))
        for index in range(plan.num_shards)
    ]
    assert plan.num_instances == sum(map(len, shards))
    assert plan.num_images == len({i.image_ref for shard in shards for i in shard})
    return shards


def keys(shards: list[list[Instance]]) -> set[str]:
    return {instance.key for shard in shards for instance in shard}


def test_selection_is_independent_of_order_form_and_shard_size(tmp_path: Path) -> None:
    plain = write_dialogs(tmp_path / "plain")
    every = keys(make_and_read_plan(plain, tmp_path / "every"))
    expected = set(heapq.nsmallest(100, every, key=lambda key: key_order_hash(key, 7)))
    shuffled = write_dialogs(tmp_path / "shuffled", order=1, form="array")
    for source in (plain, shuffled):
        for size in (1, 7, 1000):
            shards = make_and_read_plan(
                source,
                tmp_path / f"{Path(source).name}-{size}",
                f"preprocess.num_samples_per_shard={size}",
                limit=100,
                seed=7,
            )
            assert keys(shards) == expected
    assert keys(make_and_read_plan(plain, tmp_path / "seed", limit=100, seed=8)) != expected


def test_plan_bytes_are_independent_of_record_order(tmp_path: Path) -> None:
    for name, order in [("a", None), ("b", 3)]:
        source = write_dialogs(tmp_path / name, order=order)
        make_and_read_plan(source, tmp_path / f"out-{name}", "preprocess.num_samples_per_shard=20")
    names = sorted(path.name for path in (tmp_path / "out-a/plan").glob("*.parquet"))
    assert len(names) > 5
    for name in names:
        one, other = (tmp_path / f"out-{letter}/plan" / name for letter in "ab")
        assert one.read_bytes() == other.read_bytes()


def test_occurrences_of_image_share_shard(tmp_path: Path) -> None:
    source = write_dialogs(tmp_path / "corpus")
    shards = make_and_read_plan(source, tmp_path / "out", "preprocess.num_samples_per_shard=10")
    image_refs = [{instance.image_ref for instance in shard} for shard in shards]
    assert sum(map(len, image_refs)) == len(set.union(*image_refs))
    assert all(10 <= len(shard) < 20 for shard in shards[:-1])
    occurrences = Counter(instance.image_ref for shard in shards for instance in shard)
    plan = json.loads((tmp_path / "out/plan/plan.json").read_text())
    assert plan["most_occurrences"] == max(occurrences.values())
    chosen = make_and_read_plan(source, tmp_path / "few", limit=1)
    assert list(map(len, chosen)) == [1]
    assert json.loads((tmp_path / "few/plan/plan.json").read_text())["most_occurrences"] == 1


def test_plan_is_equal_when_rows_spill_to_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_dialogs(tmp_path / "corpus")
    at_once = make_and_read_plan(source, tmp_path / "at once")
    monkeypatch.setattr(hash_partition, "MAX_WAITING_BYTES", 1)
    monkeypatch.setattr("d2i.preprocess.plan.planner._BATCH", 9)
    monkeypatch.setattr("d2i.preprocess.plan.planner._BATCH_CHARS", 60)
    assert make_and_read_plan(source, tmp_path / "piecewise") == at_once


def test_remote_plan_equals_local_plan(tmp_path: Path) -> None:
    source, url = write_dialogs(tmp_path / "corpus"), f"memory://plan{tmp_path}"
    settings = "preprocess.num_samples_per_shard=2"
    make_and_read_plan(source, tmp_path / "here", settings)
    make_plan(PlanRequest("mmdialog", source, "train", recipe(settings)), url)
    local = {path.name: path.read_bytes() for path in (tmp_path / "here" / "plan").iterdir()}
    names = storage.list_names(f"{url}/plan")
    assert len(names) > 4
    assert {name: storage.read_bytes(f"{url}/plan/{name}") for name in names} == local


def test_choose_first_and_reservoir_are_deterministic(tmp_path: Path) -> None:
    source = write_dialogs(tmp_path / "corpus")
    first = keys(
        make_and_read_plan(source, tmp_path / "first", "preprocess.choose=first", limit=30)
    )
    assert len(first) == 30
    assert max(int(key.split("-")[1]) for key in first) < 30
    draws = [
        keys(
            make_and_read_plan(
                source, tmp_path / f"{i}", "preprocess.choose=reservoir", limit=30, seed=seed
            )
        )
        for i, seed in enumerate((1, 1, 2))
    ]
    assert draws[0] == draws[1] != draws[2]
    assert all(len(draw) == 30 for draw in draws)


def test_plan_batch_is_limited_by_context_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2i.preprocess.plan.planner._BATCH", 4)
    monkeypatch.setattr("d2i.preprocess.plan.planner._BATCH_CHARS", 100)
    ref = ImageRef("file", ("x",))
    made = [
        Instance(f"k{n}", "train", "", 0, 0, (Turn(0, "a" * length), Turn(1, "b")), ref)
        for n, length in enumerate([1, 200, 49, 49, 1, 1, 1, 1, 1])
    ]
    batches = list(_batches(iter(made), lambda: False))
    assert [len(batch) for batch in batches] == [2, 2, 4, 1]
    assert list(itertools.chain.from_iterable(batches)) == made


def test_excluded_keys_are_omitted_and_counted(tmp_path: Path) -> None:
    source = write_dialogs(tmp_path / "corpus")
    every = keys(make_and_read_plan(source, tmp_path / "every"))
    bare, listed, unknown = sorted(every)[0], sorted(every)[1], "train-none-0-0"
    leaks = tmp_path / "leaks.jsonl"
    other = "test-1-0-0"
    leaks.write_text(
        f'{bare}\n{{"key": "{listed}", "reason": "shared_image"}}\n\n{unknown}\n{other}\n'
    )
    exclusion = read_exclusion(str(leaks))
    left = keys(make_and_read_plan(source, tmp_path / "left", exclusion=exclusion))
    assert left == every - {bare, listed}
    plan = json.loads((tmp_path / "left/plan/plan.json").read_text())
    assert (plan["num_excluded"], plan["num_unmatched"]) == (2, 1)
    assert plan["decided_by"]["exclude"] == exclusion.sha256
    leaks.write_text(f"{other}\n{unknown}\n{listed}\n{bare}\n")
    assert read_exclusion(str(leaks)) == exclusion


def test_missing_or_malformed_exclusion_list_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_exclusion(str(tmp_path / "none"))
    (tmp_path / "list").write_text('train-1-0-0\n{"kee": 1}\n')
    with pytest.raises(ConfigError, match=r"line 2: .*`key`"):
        read_exclusion(str(tmp_path / "list"))


@pytest.mark.parametrize(
    "line",
    ["# no", "train-1-0-0,leak", '"train-1-0-0"', "train-1-0", "trian-1-0-0", '{"key": "a b"}'],
)
def test_exclusion_line_without_key_is_rejected(tmp_path: Path, line: str) -> None:
    (tmp_path / "list").write_text(f"train-a_B-1-0-0\n{line}\n")
    with pytest.raises(ConfigError, match=r"list line 2: got .*expected an instance key"):
        read_exclusion(str(tmp_path / "list"))


@pytest.mark.parametrize("limit", [0, -1])
@pytest.mark.parametrize("rule", ["hash", "reservoir", "first"])
def test_limit_below_one_is_rejected(tmp_path: Path, limit: int, rule: str) -> None:
    source = write_dialogs(tmp_path / "corpus")
    with pytest.raises(ConfigError, match=rf"limit: got {limit}, expected 1 or more"):
        make_and_read_plan(source, tmp_path / "out", f"preprocess.choose={rule}", limit=limit)


def test_corpus_without_instances_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train/conversations.json").write_text('{"conversation_id": 0, "conversation": []}')
    with pytest.raises(DataError, match="no instance"):
        make_and_read_plan(str(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out/plan/plan.json").exists()


def test_plan_without_instances_names_first_record_issue(tmp_path: Path) -> None:
    """For example image paths outside the source, in every record."""
    turns = [{"text": "a", "images": ["/photos/1.jpg"]}]
    lines = (json.dumps({"id": number, "turns": turns}) for number in range(2))
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    request = PlanRequest("jsonl", str(tmp_path), "train", load_recipe("demo"))
    with pytest.raises(DataError) as caught:
        make_plan(request, str(tmp_path / "out"))
    assert "2 bad_image_ref (first: train.jsonl line 1: turn 0 image 0: exp" in str(caught.value)


def test_record_issues_are_written_to_problems_jsonl(tmp_path: Path) -> None:
    source = write_dialogs(tmp_path / "corpus")
    with (tmp_path / "corpus/train/conversations.json").open("a") as file:
        file.write('\n{"conversation_id": 0, "conversation": []}\n{"broken": [')
    make_and_read_plan(source, tmp_path / "out")
    lines = (tmp_path / "out/plan/problems.jsonl").read_text().splitlines()
    issues = [json.loads(line) for line in lines]
    assert [(p["reason"], p["where"].rpartition(" ")[2]) for p in issues] == [
        ("duplicate_dialog_id", str(NUM_DIALOGS + 1)),
        ("truncated", str(NUM_DIALOGS + 2)),
    ]


WORD = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
INSTANCE = st.builds(
    Instance,
    key=WORD,
    split=st.sampled_from(["train", "test"]),
    dialog_id=WORD,
    turn=st.integers(0, 9),
    image=st.integers(0, 9),
    context=st.lists(st.builds(Turn, st.none() | st.integers(0, 127), WORD), max_size=4).map(tuple),
    image_ref=st.builds(
        ImageRef, st.sampled_from(["file", "urls"]), st.lists(WORD, max_size=3).map(tuple)
    ),
    direction=st.sampled_from(["answer", "first"]),
    description=st.none() | WORD,
    labels=st.lists(WORD, max_size=2).map(tuple),
)


@given(st.lists(INSTANCE, max_size=5))
def test_plan_records_round_trip(instances: list[Instance]) -> None:
    sha256 = write_records("memory://records/0.parquet", records_table(instances))
    assert read_records("memory://records/0.parquet", sha256) == instances


@given(st.lists(st.integers(1, 8), min_size=1, max_size=12), st.integers(1, 40), st.integers(0, 3))
def test_smallest_rank_sampler_is_independent_of_batch_sizes(
    sizes: list[int], limit: int, seed: int
) -> None:
    ref = ImageRef("file", ("x",))
    every = [Instance(f"k{n}", "train", "", 0, 0, (), ref) for n in range(sum(sizes))]
    choice, at, ranks, candidates = SmallestRankSampler(limit, "hash", seed), 0, [], set[str]()
    for size in sizes:
        batch = every[at : at + size]
        ranks.append(choice.rank(batch))
        candidates |= {
            i.key for i, rank in zip(batch, ranks[-1], strict=True) if rank <= choice.max_rank
        }
        at += size
    last = choice.last_rank()
    chosen = {i.key for i, r in zip(every, np.concatenate(ranks), strict=True) if r <= last}
    in_order = sorted((i.key for i in every), key=lambda key: key_order_hash(key, seed))
    assert chosen == set(in_order[:limit])
    assert chosen <= candidates
