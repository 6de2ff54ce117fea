"""Nodes of a running cluster: a list of them, and the results of a function on each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

AnswerT = TypeVar("AnswerT")

# The shortest of so many round trips gives the best reading of a node's clock.
_NUM_CLOCK_READINGS = 5
_TICK_S = 0.5


@dataclass(frozen=True)
class Node:
    """Live node, as Ray reports it.

    Args:
        node_id: Ray's ID, hexadecimal.
        address: Host name and IP address.
        num_cpus: Cores that tasks may occupy.
        num_gpus: Accelerators that tasks may occupy.
        memory_bytes: Memory that Ray leaves to tasks.
        object_store_bytes: Memory of its object store.
    """

    node_id: str
    address: str
    num_cpus: float
    num_gpus: float
    memory_bytes: int
    object_store_bytes: int


@dataclass(frozen=True)
class NodeResult(Generic[AnswerT]):
    """Result of a node, or the reason why there is none.

    Args:
        node: The node.
        answer: Its return value; None if there is a problem.
        problem: Reason why there is no answer, in one line; empty if there is one.
        clock_ahead_s: Offset of its clock from this machine's, positive if ahead, in seconds.
        clock_error_s: Uncertainty of that offset, in seconds.
    """

    node: Node
    answer: AnswerT | None
    problem: str = ""
    clock_ahead_s: float = 0.0
    clock_error_s: float = 0.0


def list_nodes() -> list[Node]:
    """List the live nodes of the open session, sorted by IP address."""
    import ray

    alive = [_node(row) for row in ray.nodes() if row["Alive"]]
    return sorted(alive, key=lambda node: (node.address, node.node_id))


def wait_for_nodes(num_nodes: int, wait_s: float) -> list[Node]:
    """Wait up to `wait_s` seconds for `num_nodes` live nodes; list those that are there."""
    deadline = time.monotonic() + wait_s
    while len(nodes := list_nodes()) < num_nodes and time.monotonic() < deadline:
        time.sleep(_TICK_S)
    return nodes


def wait_for_worker_node(wait_s: float) -> bool:
    """Wait up to `wait_s` seconds for a node with room for workers; return whether there is one."""
    deadline = time.monotonic() + wait_s
    while not any(node.num_cpus or node.num_gpus for node in list_nodes()):
        if time.monotonic() >= deadline:
            return False
        time.sleep(_TICK_S)
    return True


def dead_node_ids() -> set[str]:
    """Return Ray's IDs of the nodes that have left the cluster of the open session."""
    import ray

    return {row["NodeID"] for row in ray.nodes() if not row["Alive"]}


def run_on_each_node(
    nodes: Sequence[Node], question: Callable[[Node], AnswerT], timeout_s: float
) -> Iterator[NodeResult[AnswerT]]:
    """Run a function on all nodes at once; yield the results in the order of the nodes.

    Args:
        nodes: Nodes to run on.
        question: Picklable; called with the node, in a process on that node that ends afterwards.
        timeout_s: Time limit for all of them together.
    """
    actors = [(node, _start_on(node)) for node in nodes]
    replies = [(node, actor, actor.answer.remote(question, node)) for node, actor in actors]
    deadline = time.monotonic() + timeout_s
    for node, actor, reply in replies:
        yield _take(node, actor, reply, max(deadline - time.monotonic(), 0.0))


def _node(row: dict[str, Any]) -> Node:
    resources = row["Resources"]
    return Node(
        node_id=row["NodeID"],
        address=f"{row['NodeManagerHostname']} ({row['NodeManagerAddress']})",
        num_cpus=resources.get("CPU", 0.0),
        num_gpus=resources.get("GPU", 0.0),
        memory_bytes=int(resources.get("memory", 0)),
        object_store_bytes=int(resources.get("object_store_memory", 0)),
    )


def _start_on(node: Node) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there: Any = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=there)(_NodeActor).remote()


def _take(node: Node, actor: Any, reply: Any, timeout_s: float) -> NodeResult[Any]:
    import ray

    try:
        answer = ray.get(reply, timeout=timeout_s)
        ahead_s, error_s = _read_clock(actor)
    except ray.exceptions.GetTimeoutError:
        return NodeResult(node, None, "no response in time")
    except ray.exceptions.RayError as err:
        # The node's own error is the last line.
        return NodeResult(node, None, str(err).strip().splitlines()[-1])
    ray.kill(actor)
    return NodeResult(node, answer, "", ahead_s, error_s)


def _read_clock(actor: Any) -> tuple[float, float]:
    """Return the offset of a node's clock, positive if ahead, and its uncertainty, in seconds."""
    import ray

    readings = []
    for _ in range(_NUM_CLOCK_READINGS):
        sent_s = time.time()
        there_s = ray.get(actor.time.remote(), timeout=_NUM_CLOCK_READINGS)
        error_s = (time.time() - sent_s) / 2
        readings.append((error_s, there_s - sent_s - error_s))
    error_s, ahead_s = min(readings)
    return ahead_s, error_s


class _NodeActor:
    """Ray actor that runs a function on its node."""

    def answer(self, question: Callable[[Node], Any], node: Node) -> Any:
        return question(node)

    def time(self) -> float:
        return time.time()
