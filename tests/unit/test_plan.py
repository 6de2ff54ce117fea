"""The plan: the same instances in the same shards, however the corpus is read."""

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

from d2i import storage
from d2i.config import Recipe, apply_settings
from d2i.dialog import ImageRef, Instance, Turn, key_order_hash
from d2i.errors import ConfigError, DataError
from d2i.preprocess import hash_partition
from d2i.preprocess.exclude import read_exclusion
from d2i.preprocess.plan import PlanRequest, _batches, make_plan, records_url
from d2i.preprocess.records import read_records, records_table, write_records
from d2i.preprocess.selection import SmallestRankSampler
from d2i.recipes import load_recipe

NUM_DIALOGS, NUM_PICTURES = 120, 90


def write_dialogs(folder: Path, *, order: int | None = None, form: str = "lines") -> str:
    """Write a corpus whose pictures occur several times, its records in a seeded order."""
    dice = random.Random(0)
    records = [
        {
            "conversation_id": number,
            "conversation": [
                {"turn": [{"__TEXT__": f"say {number}"}, {"__MEDIA__": str(picture)}]}
                for picture in dice.choices(range(NUM_PICTURES), k=dice.randint(1, 4))
            ],
        }
        for number in range(NUM_DIALOGS)
    ]
    if order is not None:
        random.Random(order).shuffle(records)
    path = folder / "train" / "conversations.json"
    path.parent.mkdir(parents=True)
    lines = "\n".join(map(json.dumps, records))
    path.write_text(lines if form == "lines" else json.dumps(records, indent=1))
    return str(folder)


def recipe(*settings: str) -> Recipe:
    return apply_settings(load_recipe("uvit-s-mmdialog"), settings)


def planned(source: str, out: Path, *settings: str, **request: object) -> list[list[Instance]]:
    """Plan, and read the shards' records back."""
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


def test_the_chosen_are_the_same_for_any_order_form_and_number_of_shards(tmp_path: Path) -> None:
    plain = write_dialogs(tmp_path / "plain")
    every = keys(planned(plain, tmp_path / "every"))
    expected = set(heapq.nsmallest(100, every, key=lambda key: key_order_hash(key, 7)))
    shuffled = write_dialogs(tmp_path / "shuffled", order=1, form="array")
    for source in (plain, shuffled):
        for size in (1, 7, 1000):
            shards = planned(
                source,
                tmp_path / f"{Path(source).name}-{size}",
                f"preprocess.num_samples_per_shard={size}",
                limit=100,
                seed=7,
            )
            assert keys(shards) == expected
    assert keys(planned(plain, tmp_path / "seed", limit=100, seed=8)) != expected


def test_shuffled_input_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, order in [("a", None), ("b", 3)]:
        source = write_dialogs(tmp_path / name, order=order)
        planned(source, tmp_path / f"out-{name}", "preprocess.num_samples_per_shard=20")
    names = sorted(path.name for path in (tmp_path / "out-a/plan").glob("*.parquet"))
    assert len(names) > 5
    for name in names:
        one, other = (tmp_path / f"out-{letter}/plan" / name for letter in "ab")
        assert one.read_bytes() == other.read_bytes()


def test_occurrences_of_a_picture_share_a_shard(tmp_path: Path) -> None:
    source = write_dialogs(tmp_path / "corpus")
    shards = planned(source, tmp_path / "out", "preprocess.num_samples_per_shard=10")
    pictures = [{instance.image_ref for instance in shard} for shard in shards]
    assert sum(map(len, pictures)) == len(set.union(*pictures))
    assert all(10 <= len(shard) < 20 for shard in shards[:-1])
    occurrences = Counter(instance.image_ref for shard in shards for instance in shard)
    plan = json.loads((tmp_path / "out/plan/plan.json").read_text())
    assert plan["most_occurrences"] == max(occurrences.values())
    chosen = planned(source, tmp_path / "few", limit=1)
    assert list(map(len, chosen)) == [1]
    assert json.loads((tmp_path / "few/plan/plan.json").read_text())["most_occurrences"] == 1


def test_rows_that_went_through_files_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_dialogs(tmp_path / "corpus")
    at_once = planned(source, tmp_path / "at once")
    monkeypatch.setattr(hash_partition, "MAX_WAITING_BYTES", 1)
    monkeypatch.setattr("d2i.preprocess.plan._BATCH", 9)
    monkeypatch.setattr("d2i.preprocess.plan._BATCH_CHARS", 60)
    assert planned(source, tmp_path / "piecewise") == at_once


def test_a_plan_written_elsewhere_is_the_one_written_here(tmp_path: Path) -> None:
    source, url = write_dialogs(tmp_path / "corpus"), f"memory://plan{tmp_path}"
    settings = "preprocess.num_samples_per_shard=2"
    planned(source, tmp_path / "here", settings)
    make_plan(PlanRequest("mmdialog", source, "train", recipe(settings)), url)
    here = {path.name: path.read_bytes() for path in (tmp_path / "here" / "plan").iterdir()}
    names = storage.list_names(f"{url}/plan")
    assert len(names) > 4
    assert {name: storage.read_bytes(f"{url}/plan/{name}") for name in names} == here


def test_other_rules_of_choice(tmp_path: Path) -> None:
    source = write_dialogs(tmp_path / "corpus")
    first = keys(planned(source, tmp_path / "first", "preprocess.choose=first", limit=30))
    assert len(first) == 30
    assert max(int(key.split("-")[1]) for key in first) < 30
    draws = [
        keys(planned(source, tmp_path / f"{i}", "preprocess.choose=reservoir", limit=30, seed=seed))
        for i, seed in enumerate((1, 1, 2))
    ]
    assert draws[0] == draws[1] != draws[2]
    assert all(len(draw) == 30 for draw in draws)


def test_a_batch_ends_where_its_contexts_are_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2i.preprocess.plan._BATCH", 4)
    monkeypatch.setattr("d2i.preprocess.plan._BATCH_CHARS", 100)
    ref = ImageRef("file", ("x",))
    made = [
        Instance(f"k{n}", "train", "", 0, 0, (Turn(0, "a" * length), Turn(1, "b")), ref)
        for n, length in enumerate([1, 200, 49, 49, 1, 1, 1, 1, 1])
    ]
    batches = list(_batches(iter(made), lambda: False))
    assert [len(batch) for batch in batches] == [2, 2, 4, 1]
    assert list(itertools.chain.from_iterable(batches)) == made


def test_excluded_keys_are_left_out_and_counted(tmp_path: Path) -> None:
    source = write_dialogs(tmp_path / "corpus")
    every = keys(planned(source, tmp_path / "every"))
    bare, listed, unknown = sorted(every)[0], sorted(every)[1], "train-none-0-0"
    leaks = tmp_path / "leaks.jsonl"
    other = "test-1-0-0"
    leaks.write_text(
        f'{bare}\n{{"key": "{listed}", "reason": "shared_image"}}\n\n{unknown}\n{other}\n'
    )
    exclusion = read_exclusion(str(leaks))
    left = keys(planned(source, tmp_path / "left", exclusion=exclusion))
    assert left == every - {bare, listed}
    plan = json.loads((tmp_path / "left/plan/plan.json").read_text())
    assert (plan["num_excluded"], plan["num_unmatched"]) == (2, 1)
    assert plan["decided_by"]["exclude"] == exclusion.sha256
    leaks.write_text(f"{other}\n{unknown}\n{listed}\n{bare}\n")
    assert read_exclusion(str(leaks)) == exclusion


def test_a_list_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_exclusion(str(tmp_path / "none"))
    (tmp_path / "list").write_text('train-1-0-0\n{"kee": 1}\n')
    with pytest.raises(ConfigError, match=r"line 2: .*`key`"):
        read_exclusion(str(tmp_path / "list"))


@pytest.mark.parametrize(
    "line",
    ["# no", "train-1-0-0,leak", '"train-1-0-0"', "train-1-0", "trian-1-0-0", '{"key": "a b"}'],
)
def test_a_line_that_holds_no_key_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "list").write_text(f"train-a_B-1-0-0\n{line}\n")
    with pytest.raises(ConfigError, match=r"list line 2: got .*expected an instance key"):
        read_exclusion(str(tmp_path / "list"))


@pytest.mark.parametrize("limit", [0, -1])
@pytest.mark.parametrize("rule", ["hash", "reservoir", "first"])
def test_a_limit_below_one_is_refused(tmp_path: Path, limit: int, rule: str) -> None:
    source = write_dialogs(tmp_path / "corpus")
    with pytest.raises(ConfigError, match=rf"limit: got {limit}, expected 1 or more"):
        planned(source, tmp_path / "out", f"preprocess.choose={rule}", limit=limit)


def test_a_corpus_without_instances_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train/conversations.json").write_text('{"conversation_id": 0, "conversation": []}')
    with pytest.raises(DataError, match="no instance"):
        planned(str(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out/plan/plan.json").exists()


def test_a_plan_of_no_instance_says_what_is_wrong_with_the_first_record(tmp_path: Path) -> None:
    """Such as paths that are none below the source, in every record."""
    turns = [{"text": "a", "images": ["/photos/1.jpg"]}]
    lines = (json.dumps({"id": number, "turns": turns}) for number in range(2))
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    request = PlanRequest("jsonl", str(tmp_path), "train", load_recipe("demo"))
    with pytest.raises(DataError) as caught:
        make_plan(request, str(tmp_path / "out"))
    assert "2 bad_image_ref (first: train.jsonl line 1: turn 0 image 0: exp" in str(caught.value)


def test_every_problem_is_written_down(tmp_path: Path) -> None:
    source = write_dialogs(tmp_path / "corpus")
    with (tmp_path / "corpus/train/conversations.json").open("a") as file:
        file.write('\n{"conversation_id": 0, "conversation": []}\n{"broken": [')
    planned(source, tmp_path / "out")
    lines = (tmp_path / "out/plan/problems.jsonl").read_text().splitlines()
    problems = [json.loads(line) for line in lines]
    assert [(p["reason"], p["where"].rpartition(" ")[2]) for p in problems] == [
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
def test_records_read_back_the_same(instances: list[Instance]) -> None:
    sha256 = write_records("memory://records/0.parquet", records_table(instances))
    assert read_records("memory://records/0.parquet", sha256) == instances


@given(st.lists(st.integers(1, 8), min_size=1, max_size=12), st.integers(1, 40), st.integers(0, 3))
def test_the_smallest_ranks_are_kept_whatever_the_batches(
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
