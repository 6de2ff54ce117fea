"""The simulation of cluster jobs behaves as the jobs do, and docs/scale.md holds its output."""

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
    # Its dataclasses look up their own module.
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


def double_resource(resource: str) -> Any:
    """Return the costs with twice as much of one resource."""
    changed = {name: 2 * getattr(WITHOUT_LOSSES, name) for name in FASTER.get(resource, ())}
    changed |= {name: getattr(WITHOUT_LOSSES, name) / 2 for name in CHEAPER.get(resource, ())}
    return WITHOUT_LOSSES.but(**changed)


def test_scale_page_matches_simulation() -> None:
    page = (ROOT / "docs" / "scale.md").read_text()
    printed = page.partition(scale.BEGIN)[2].partition(scale.END)[0]
    assert printed == f"\n{scale.all_tables(COSTS)}\n"


def test_scale_page_commands_parse() -> None:
    page = (ROOT / "docs" / "scale.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    parsers = {f"benchmarks/{p.__name__}.py": p.build_parser() for p in (scale, scale_costs)}
    assert lines
    for line in lines:
        _, program, *words = shlex.split(line)
        parsers[program].parse_args(words)


def test_held_out_measurements_are_disjoint_from_fitted() -> None:
    kinds = [{run["times"] for run in COSTS.record[part]} for part in ("fitted", "held_out")]
    assert kinds == [set(scale_costs.FITTED), set(scale_costs.HELD_OUT)]


def test_held_out_times_are_predicted_within_25_percent() -> None:
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
def test_time_is_linear_in_number_of_instances(name: str) -> None:
    once, twice, thrice = (time_of(name, WITHOUT_LOSSES, times * NUM, 4) for times in (1, 2, 3))
    assert thrice - twice == pytest.approx(twice - once, rel=0.1)


@pytest.mark.parametrize("name", CASES)
def test_lost_nodes_only_add_time(name: str) -> None:
    often = COSTS.but(lost_every_s=COSTS.lost_every_s / 10)
    without, some, many = (time_of(name, c, NUM, 4) for c in (WITHOUT_LOSSES, COSTS, often))
    assert without <= 1.001 * some
    assert some <= 1.001 * many


@pytest.mark.parametrize("failure_share", ["passing_share", "dead_share", "store_error_share"])
def test_failures_only_add_time(failure_share: str) -> None:
    for name in CASES:
        worse = COSTS.but(**{failure_share: 0.5})
        assert time_of(name, worse, NUM, 4) >= 0.999 * time_of(name, COSTS, NUM, 4)


# 128 ranks cannot divide UniDiffuser's batch evenly.
NAMES_AND_NODES = [(n, k) for n in CASES for k in (1, 4, 16) if (n, k) != ("train-unidiffuser", 16)]


@pytest.mark.parametrize(("name", "num_nodes"), NAMES_AND_NODES)
def test_doubling_bottleneck_helps_most(name: str, num_nodes: int) -> None:
    found = scale.CASES[name].simulate(WITHOUT_LOSSES, NUM, num_nodes)
    resources = [*FASTER, *CHEAPER]
    assert found.bottleneck in resources
    times = {
        resource: time_of(name, double_resource(resource), NUM, num_nodes) for resource in resources
    }
    # Resources that are about as busy may help as much.
    as_busy = [t for t in resources if found.shares.get(t, 0.0) > 0.9 * max(found.shares.values())]
    assert min(times[resource] for resource in as_busy) <= 1.01 * min(times.values())
    assert times[found.bottleneck] < 0.99 * found.time_s


@given(
    num_tasks=st.integers(1, 60),
    num_nodes=st.integers(1, 4),
    lanes=st.integers(1, 3),
    feed_s=st.floats(0.0, 5.0),
    finish_s=st.floats(0.1, 5.0),
    lost_every_s=st.floats(20.0, 200.0),
)
def test_every_task_finishes_once_despite_lost_nodes(
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


def test_pipeline_time_without_waits_is_number_of_rounds() -> None:
    site = scale.Site(num_nodes=2, num_cores=2, num_producers=0, num_consumers=4)
    assert scale.Flowing(scale.Task(0.0, 3.0), 9, site).run().time_s == 9.0
    with_producer = scale.Site(num_nodes=1, num_cores=8, num_producers=1, num_consumers=1)
    # The producer works on one task while the consumer works on the one before: 2 + 10 x 3.
    assert scale.Flowing(scale.Task(2.0, 3.0), 10, with_producer).run().time_s == 32.0


def test_training_resumes_from_checkpoint_after_node_loss() -> None:
    walk = scale.Walk(1.0, 0.0, num_checkpoint_steps=10, lost_every_s=25.0, back_s=4.0)
    # Two checkpoints, 5 lost seconds, 4 to restart, and the last ten steps.
    assert walk.time_s(30) == 25.0 + 4.0 + 10.0
    endless = scale.Walk(1.0, 0.0, num_checkpoint_steps=30, lost_every_s=25.0, back_s=4.0)
    assert endless.time_s(60) == math.inf


def test_ranks_that_cannot_share_batch_are_rejected_as_in_d2i() -> None:
    found = scale.CASES["train-unidiffuser"].simulate(COSTS, NUM, 16)
    config = load_recipe("unidiffuser-v1-mmdialog").train
    assert found.refused == "128 ranks cannot share a batch of 800"
    with pytest.raises(ConfigError, match="800, which 128 ranks cannot split evenly"):
        config.accumulation(128)


def test_each_limit_scales_with_its_own_resource() -> None:
    roomy = COSTS.but(mapped_shards=2 * COSTS.mapped_shards, driver_bytes=2 * COSTS.driver_bytes)
    before = {one.what: one.num_instances for one in scale.limits(COSTS)}
    after = {one.what: one.num_instances for one in scale.limits(roomy)}
    doubled = {name for name in before if after[name] == pytest.approx(2 * before[name])}
    assert doubled == {
        "the driver's memory, at the end of a split",
        "the driver's memory, for scores",
        "maps: a shard is opened for nearly each sample",
    }
    assert all(after[name] == before[name] for name in set(before) - doubled)
