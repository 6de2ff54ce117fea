"""The nodes of a running cluster, one by one: which there are, and what each answers for itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

AnswerT = TypeVar("AnswerT")

# The shortest of so many round trips tells a node's clock best.
_NUM_CLOCK_READINGS = 5
_TICK_S = 0.5


@dataclass(frozen=True)
class Node:
    """One node that is alive, as Ray counts it.

    Args:
        node_id: Ray's own name of it, hexadecimal.
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
    """What a node answered, or why it did not.

    Args:
        node: Who was asked.
        answer: What it returned; None where there is a problem.
        problem: Why there is no answer, in one line; empty where there is one.
        clock_ahead_s: How far its clock is ahead of this one's, in seconds.
        clock_error_s: How far that may be off, in seconds.
    """

    node: Node
    answer: AnswerT | None
    problem: str = ""
    clock_ahead_s: float = 0.0
    clock_error_s: float = 0.0


def list_nodes() -> list[Node]:
    """List the nodes of the session that is open, by address."""
    import ray

    alive = [_node(row) for row in ray.nodes() if row["Alive"]]
    return sorted(alive, key=lambda node: (node.address, node.node_id))


def wait_for_nodes(num_nodes: int, wait_s: float) -> list[Node]:
    """List the nodes once there are so many, or after so long those that are there."""
    deadline = time.monotonic() + wait_s
    while len(nodes := list_nodes()) < num_nodes and time.monotonic() < deadline:
        time.sleep(_TICK_S)
    return nodes


def run_on_each_node(
    nodes: Sequence[Node], question: Callable[[Node], AnswerT], timeout_s: float
) -> Iterator[NodeResult[AnswerT]]:
    """Ask all nodes at once; yield their answers in the order of the nodes.

    Args:
        nodes: Who is asked.
        question: Picklable; called with the node, in a process on that node that ends with it.
        timeout_s: How long all of them together may take.
    """
    asked = [(node, _start_on(node)) for node in nodes]
    replies = [(node, actor, actor.answer.remote(question, node)) for node, actor in asked]
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
        return NodeResult(node, None, "no answer in time")
    except ray.exceptions.RayError as err:
        # What the node itself raised stands last.
        return NodeResult(node, None, str(err).strip().splitlines()[-1])
    ray.kill(actor)
    return NodeResult(node, answer, "", ahead_s, error_s)


def _read_clock(actor: Any) -> tuple[float, float]:
    """Return how far a node's clock is ahead, and how far that may be off, in seconds."""
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
    """Answers for the node that it is on."""

    def answer(self, question: Callable[[Node], Any], node: Node) -> Any:
        return question(node)

    def time(self) -> float:
        return time.time()
