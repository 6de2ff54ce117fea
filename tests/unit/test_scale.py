"""The simulation of jobs on clusters behaves as they do, and its page holds what it prints."""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2i.errors import ConfigError
from d2i.recipes import load_recipe

ROOT = Path(__file__).resolve().parents[2]
NUM = 40_000_000


def _load_program(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look for their own module.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


scale: Any = _load_program("scale")
scale_costs: Any = _load_program("scale_costs")
COSTS = scale.load_costs()
CASES = list(scale.CASES)
WITHOUT_LOSSES = COSTS.but(lost_every_s=math.inf)

FASTER = {
    "accelerators": ("bf16_flop", "fp32_flop"),
    "reads of the store": ("gets",),
    "writes to the store": ("puts",),
    "network": ("link",),
    "books of hosts": ("shared_calls_per_s",),
    "pace of hosts": ("host_per_s",),
    "answers": ("asked_at_once",),
}
CHEAPER = {
    "driver": ("plan_s", "look_through_s", "fold_s", "block_s", "task_s", "pool_task_s", "score_s"),
    "cores": ("feed_s", "sample_s", "shard_s", "read_s", "map_s"),
}


def time_of(name: str, costs: Any, num: int, num_nodes: int) -> float:
    found: float = scale.CASES[name].simulate(costs, num, num_nodes).time_s
    return found


def twice_as_good(thing: str) -> Any:
    """What would be if there were twice as much of one thing."""
    changed = {name: 2 * getattr(WITHOUT_LOSSES, name) for name in FASTER.get(thing, ())}
    changed |= {name: getattr(WITHOUT_LOSSES, name) / 2 for name in CHEAPER.get(thing, ())}
    return WITHOUT_LOSSES.but(**changed)


def test_the_page_holds_what_the_costs_give() -> None:
    page = (ROOT / "docs" / "scale.md").read_text()
    printed = page.partition(scale.BEGIN)[2].partition(scale.END)[0]
    assert printed == f"\n{scale.all_tables(COSTS)}\n"


def test_the_pages_commands_parse() -> None:
    page = (ROOT / "docs" / "scale.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    parsers = {f"benchmarks/{p.__name__}.py": p.build_parser() for p in (scale, scale_costs)}
    assert lines
    for line in lines:
        _, program, *words = shlex.split(line)
        parsers[program].parse_args(words)


def test_what_was_held_out_is_none_of_what_was_fitted() -> None:
    kinds = [{run["times"] for run in COSTS.record[part]} for part in ("fitted", "held_out")]
    assert kinds == [set(scale_costs.FITTED), set(scale_costs.HELD_OUT)]


def test_what_was_held_out_is_predicted_within_a_quarter() -> None:
    rows = scale.held_out(COSTS.record)
    assert {(row["stage"], row["times"]) for row in rows} == {
        (stage, times) for stage in scale_costs.NUM_UNITS for times in scale_costs.HELD_OUT
    }
    assert COSTS.record["repeats"] >= 3
    assert max(abs(row["error"]) for row in rows) <= 0.25


@pytest.mark.parametrize("name", CASES)
def test_more_nodes_are_not_slower(name: str) -> None:
    times = [time_of(name, COSTS, NUM, nodes) for nodes in (1, 4, 16)]
    known = [time for time in times if time < math.inf]
    for fewer, more in itertools.pairwise(known):
        assert more <= 1.01 * fewer


@pytest.mark.parametrize("name", CASES)
def test_twice_as_many_instances_take_twice_as_long_beside_the_start(name: str) -> None:
    once, twice, thrice = (time_of(name, WITHOUT_LOSSES, times * NUM, 4) for times in (1, 2, 3))
    assert thrice - twice == pytest.approx(twice - once, rel=0.1)


@pytest.mark.parametrize("name", CASES)
def test_lost_nodes_only_add_time(name: str) -> None:
    often = COSTS.but(lost_every_s=COSTS.lost_every_s / 10)
    without, some, many = (time_of(name, c, NUM, 4) for c in (WITHOUT_LOSSES, COSTS, often))
    assert without <= 1.001 * some
    assert some <= 1.001 * many


@pytest.mark.parametrize("trouble", ["passing_share", "dead_share", "store_error_share"])
def test_trouble_only_adds_time(trouble: str) -> None:
    for name in CASES:
        worse = COSTS.but(**{trouble: 0.5})
        assert time_of(name, worse, NUM, 4) >= 0.999 * time_of(name, COSTS, NUM, 4)


# 128 ranks cannot share UniDiffuser's batch.
PLACES = [(n, k) for n in CASES for k in (1, 4, 16) if (n, k) != ("train-unidiffuser", 16)]


@pytest.mark.parametrize(("name", "num_nodes"), PLACES)
def test_more_of_the_bottleneck_helps_most(name: str, num_nodes: int) -> None:
    found = scale.CASES[name].simulate(WITHOUT_LOSSES, NUM, num_nodes)
    things = [*FASTER, *CHEAPER]
    assert found.bottleneck in things
    times = {thing: time_of(name, twice_as_good(thing), NUM, num_nodes) for thing in things}
    # What is about as busy may help as much.
    as_busy = [t for t in things if found.shares.get(t, 0.0) > 0.9 * max(found.shares.values())]
    assert min(times[thing] for thing in as_busy) <= 1.01 * min(times.values())
    assert times[found.bottleneck] < 0.99 * found.time_s


@given(
    num_tasks=st.integers(1, 60),
    num_nodes=st.integers(1, 4),
    lanes=st.integers(1, 3),
    feed_s=st.floats(0.0, 5.0),
    finish_s=st.floats(0.1, 5.0),
    lost_every_s=st.floats(20.0, 200.0),
)
def test_every_task_is_finished_once_whatever_is_lost(
    num_tasks: int,
    num_nodes: int,
    lanes: int,
    feed_s: float,
    finish_s: float,
    lost_every_s: float,
) -> None:
    task = scale.Task(feed_s, finish_s, shared_s=({"driver": 0.01}, {"driver": 0.02}))
    num_lanes = lanes * num_nodes
    for num_producers in (0, num_lanes):
        site = scale.Site(num_nodes, 2, num_producers, num_lanes, lost_every_s, replaced_s=3.0)
        found = scale.Flowing(task, num_tasks, site).run()
        assert len(found.marks_s) == num_tasks
        assert found.time_s >= num_tasks * finish_s / num_lanes - 1e-6
        assert found.busy_s["finishers"] == pytest.approx(num_tasks * finish_s / num_lanes)
        assert found.busy_s["feeders"] <= found.time_s + 1e-6


def test_without_anything_to_wait_for_the_rounds_are_counted() -> None:
    site = scale.Site(num_nodes=2, num_cores=2, num_producers=0, num_consumers=4)
    assert scale.Flowing(scale.Task(0.0, 3.0), 9, site).run().time_s == 9.0
    fed = scale.Site(num_nodes=1, num_cores=8, num_producers=1, num_consumers=1)
    # One is fed while the one before is finished: 2 + 10 x 3.
    assert scale.Flowing(scale.Task(2.0, 3.0), 10, fed).run().time_s == 32.0


def test_training_goes_back_to_its_checkpoint_when_a_node_is_lost() -> None:
    walk = scale.Walk(1.0, 0.0, num_checkpoint_steps=10, lost_every_s=25.0, back_s=4.0)
    # Two checkpoints, 5 seconds in vain, 4 to come back, the last ten steps.
    assert walk.time_s(30) == 25.0 + 4.0 + 10.0
    hopeless = scale.Walk(1.0, 0.0, num_checkpoint_steps=30, lost_every_s=25.0, back_s=4.0)
    assert hopeless.time_s(60) == math.inf


def test_ranks_that_cannot_share_the_batch_are_refused_as_d2i_does() -> None:
    found = scale.CASES["train-unidiffuser"].simulate(COSTS, NUM, 16)
    config = load_recipe("unidiffuser-v1-mmdialog").train
    assert found.refused == "128 ranks cannot share a batch of 800"
    with pytest.raises(ConfigError, match="800, which 128 ranks cannot split evenly"):
        config.accumulation(128)


def test_a_limit_is_where_its_own_numbers_put_it() -> None:
    roomy = COSTS.but(mapped_shards=2 * COSTS.mapped_shards, driver_bytes=2 * COSTS.driver_bytes)
    before = {one.what: one.num_instances for one in scale.limits(COSTS)}
    after = {one.what: one.num_instances for one in scale.limits(roomy)}
    doubled = {what for what in before if after[what] == pytest.approx(2 * before[what])}
    assert doubled == {
        "the driver's memory, at the end of a split",
        "the driver's memory, for scores",
        "maps: a shard is opened for nearly each sample",
    }
    assert all(after[what] == before[what] for what in set(before) - doubled)
