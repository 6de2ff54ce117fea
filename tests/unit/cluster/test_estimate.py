"""Time and cost forecasts of a job, from measured rates or rates labelled as assumed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2i.cli.options import assumed_of
from d2i.cluster import Capacity, Session
from d2i.cluster.estimate import (
    Rate,
    RateOverrides,
    Throughput,
    Work,
    find_rate,
    forecast,
    save_rate,
)
from d2i.errors import ConfigError
from d2i.preprocess.job import PreprocessRequest, plan_job, preprocess, rate_decided_by, work_left
from d2i.recipes import resolve_recipe
from tests.integration.conftest import write_chat
from tests.processes import run_d2i

CAPACITY = Capacity(num_nodes=4, num_workers=8, unit="accelerator", object_store_bytes=1 << 30)
WORK = Work(num_items=20_000, num_tasks=20, bytes_in_flight=100)
MEASURED = Rate(items_per_s=5.0, num_items=1000, num_workers=2, host="here", date="2026-01-02")


def test_forecast_time_is_that_of_busiest_worker() -> None:
    found = forecast(WORK, CAPACITY, MEASURED, RateOverrides(price_per_node_hour=3.6))
    # 20 tasks of 1000 instances on 8 workers: the busiest has three, 200 s each.
    assert found.num_rounds == 3
    assert found.time_s == 600.0
    assert found.cost == pytest.approx(4 * 3.6 * 600 / 3600)
    assert found.bytes_in_flight == 800
    assert "measured by here on 2026-01-02 over 1000 instances" in found.rate_from


def test_rate_override_wins_and_is_labelled_assumed() -> None:
    found = forecast(WORK, CAPACITY, MEASURED, RateOverrides(items_per_s=10.0))
    assert found.time_s == 300.0
    assert found.rate_from == "assumed (--rate)"
    assert found.cost is None


def test_forecast_without_rate_is_unknown() -> None:
    found = forecast(WORK, CAPACITY, None, RateOverrides(price_per_node_hour=1.0))
    assert (found.items_per_s, found.time_s, found.cost) == (None, None, None)
    assert found.rate_from.startswith("unknown")


def test_forecast_of_finished_work_is_zero() -> None:
    found = forecast(Work(0, 0, 100), CAPACITY, MEASURED, RateOverrides(price_per_node_hour=1.0))
    assert (found.num_workers, found.num_rounds, found.time_s, found.cost) == (0, 0, 0.0, 0.0)


@given(
    num_workers=st.integers(1, 6),
    rounds=st.integers(2, 9),
    items=st.integers(1, 50),
    start_s=st.floats(0, 1000),
    task_s=st.floats(0.5, 50),
)
def test_throughput_of_equal_workers_ignores_start_time(
    num_workers: int, rounds: int, items: int, start_s: float, task_s: float
) -> None:
    now = [0.0]
    throughput = Throughput(num_workers, lambda: now[0])
    assert throughput.rate() is None
    for number in range(rounds):
        now[0] = start_s + (number + 1) * task_s
        for _ in range(num_workers):
            throughput.add(items)
    rate = throughput.rate()
    assert rate is not None
    assert rate.items_per_s == pytest.approx(items / task_s, rel=1e-6)
    assert rate.num_items == (rounds - 1) * num_workers * items


def test_saved_rate_is_found_for_same_work_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    save_rate({"stage": "eval", "steps": 50}, MEASURED)
    assert find_rate({"steps": 50, "stage": "eval"}) == MEASURED
    assert find_rate({"steps": 25, "stage": "eval"}) is None
    (kept,) = tmp_path.rglob("*.json")
    kept.write_text("half a fi")
    assert find_rate({"steps": 50, "stage": "eval"}) is None


def test_preprocess_saves_rate_for_next_forecast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    request = PreprocessRequest(
        corpus="jsonl",
        source=str(write_chats(tmp_path)),
        out=str(tmp_path / "out"),
        recipe=resolve_recipe("demo", ["preprocess.num_samples_per_shard=2"]),
    )
    before = work_left(request, plan_job(request, keep=False))
    assert (before.num_items, before.num_tasks) == (8, 4)
    assert find_rate(rate_decided_by(request, "core")) is None
    preprocess(request, Session(0), lambda _: None)
    after = work_left(request, plan_job(request, keep=False))
    assert (after.num_items, after.num_tasks) == (0, 0)
    rate = find_rate(rate_decided_by(request, Session(0).capacity().unit))
    assert rate is not None
    assert (rate.num_items, rate.num_workers) == (6, 1), "all but the first shard"
    assert rate.items_per_s > 0


def test_dry_run_shows_forecast(tmp_path: Path) -> None:
    planned = run_d2i(
        *("preprocess", "--corpus", "jsonl", "--source", write_chats(tmp_path), "--recipe", "demo"),
        *("--out", tmp_path / "out", "--set", "preprocess.num_samples_per_shard=2", "--json"),
        *("--workers", 3, "--dry-run", "--rate", 2, "--price-per-node-hour", 1800),
    )
    found = planned["forecast"]
    # Two rounds of two instances, at two instances a second.
    assert (found["num_rounds"], found["time_s"], found["cost"]) == (2, 2.0, 1.0)
    assert not (tmp_path / "out").exists()


def test_forecast_options_require_dry_run() -> None:
    with pytest.raises(ConfigError, match="--rate applies only to a dry run; expected --dry-run"):
        assumed_of(3.0, None, dry_run=False)


def write_chats(directory: Path) -> Path:
    """Write eight chats with an image each."""
    chats = directory / "chats"
    chats.mkdir()
    (chats / "test.jsonl").write_text("\n".join(write_chat(chats, f"c{n}") for n in range(8)))
    return chats
