"""Each crash counts as a failure of a task, but a node that dies only once."""

from __future__ import annotations

from d2i.cluster.actor_pool import WorkerLosses


def losses(*node_ids: str | None) -> WorkerLosses:
    found = WorkerLosses()
    for node_id in node_ids:
        found.add("task", node_id)
    return found


def test_every_crash_on_living_nodes_counts() -> None:
    assert losses("a", "a", "b", "a").count("task", dead=set()) == 4
    assert losses("a").count("another task", dead=set()) == 0


def test_workers_lost_with_their_node_count_once() -> None:
    """Eight workers were loading their models when their node was taken away."""
    assert losses(*["spot"] * 8).count("task", dead={"spot", "other"}) == 1


def test_task_that_kills_node_after_node_fails() -> None:
    assert losses(*"abcd").count("task", dead=set("abcd")) == 4


def test_worker_that_never_answered_counts() -> None:
    assert losses(None, None, "a", "a").count("task", dead={"a"}) == 3


def test_cleared_losses_do_not_count() -> None:
    found = losses("a", "a")
    found.clear("task")
    assert found.count("task", dead=set()) == 0
    assert found.nodes("task") == set()
