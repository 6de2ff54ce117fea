"""Checks of a Ray cluster, node by node, before a job burns hours there."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from d2i.cluster import Session
from d2i.cluster.nodes import Node, NodeResult, run_on_each_node, wait_for_nodes
from d2i.config import Recipe
from d2i.doctor.check import Check, first_line
from d2i.doctor.node import Probe, Question, inspect_node, installed_versions
from d2i.doctor.weights import weights_of
from d2i.errors import D2IError
from d2i.io import storage

_GIB = 2**30
_ANSWER_TIMEOUT_S = 300.0
# Object stores refuse signatures that are minutes off; rows of a ledger should be in order.
_MAX_CLOCK_SKEW_S = 300.0
_GOOD_CLOCK_SKEW_S = 2.0
# Planned shards in flight for each worker: one being produced, one waiting, one being consumed.
_NUM_SHARDS_IN_FLIGHT = 3


@dataclass(frozen=True)
class ClusterRequest:
    """Requirements on a cluster.

    Args:
        num_nodes: Number of nodes that there must be; None takes those that are there.
        wait_s: How long to wait for them, in seconds.
        recipe: Recipe whose weights every node must have; None checks none.
        storage_urls: Directories that every node must read and write.
    """

    num_nodes: int | None = None
    wait_s: float = 300.0
    recipe: Recipe | None = None
    storage_urls: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """Rows of one node, or of the cluster as a whole."""

    name: str
    checks: list[Check]


def check_cluster(request: ClusterRequest, session: Session) -> Iterator[Report]:
    """Check the cluster of a session as a whole, then each node.

    Raises:
        ClusterError: If it cannot be reached.
    """
    session.start()
    with _probes(request) as (probes, problems):
        nodes = wait_for_nodes(request.num_nodes or 1, request.wait_s)
        yield Report("cluster", [*_cluster_checks(request, nodes), *problems])
        weights = weights_of(request.recipe) if request.recipe else ()
        question = Question(installed_versions(), weights, probes)
        for answer in run_on_each_node(nodes, partial(_inspect, question), _ANSWER_TIMEOUT_S):
            yield Report(_describe(answer.node), _node_checks(answer, request.recipe))


def _inspect(question: Question, node: Node) -> list[Check]:
    return inspect_node(question, node.num_gpus, node.node_id)


def _cluster_checks(request: ClusterRequest, nodes: Sequence[Node]) -> list[Check]:
    wanted = request.num_nodes or len(nodes)
    detail = f"{len(nodes)} of {wanted} expected" if request.num_nodes else f"{len(nodes)}"
    is_short = len(nodes) < wanted
    fix = f"some did not join within {request.wait_s:.0f} s: see the logs of the missing nodes"
    came = Check("nodes", "fail", detail, fix) if is_short else Check("nodes", "ok", detail)
    return [came, _check_workers(sum(n.num_gpus for n in nodes), sum(n.num_cpus for n in nodes))]


def _check_workers(num_gpus: float, num_cpus: float) -> Check:
    """Check that there is an accelerator or a core for a worker."""
    if num_gpus:
        detail = f"{num_gpus:g} accelerators, one worker each; {num_cpus:g} cores for fetching"
        return Check("workers", "ok", detail)
    detail = f"no accelerator; {num_cpus:g} cores, one worker each"
    if num_cpus:
        return Check("workers", "ok", detail)
    return Check("workers", "fail", detail, "add nodes, or start them without --num-cpus=0")


def _node_checks(answer: NodeResult[list[Check]], recipe: Recipe | None) -> list[Check]:
    if answer.answer is None:
        fix = "start the node from the same image or environment as the driver"
        return [Check("answer", "fail", answer.problem, fix)]
    return [*answer.answer, _check_object_store(answer.node, recipe), _check_clock(answer)]


def _check_object_store(node: Node, recipe: Recipe | None) -> Check:
    """Check that the shards that may be in flight fit in a node's object store."""
    name, size = "object store", node.object_store_bytes
    detail = f"{size / _GIB:.1f} GiB"
    fitting = int(node.num_gpus or node.num_cpus)
    if recipe is None or not fitting:
        return Check(name, "ok", detail)
    shard_bytes = recipe.preprocess.num_samples_per_shard * 3 * recipe.image.resolution**2
    needed = _NUM_SHARDS_IN_FLIGHT * fitting * shard_bytes
    if size >= needed:
        return Check(name, "ok", f"{detail}; shards in flight may take {needed / _GIB:.1f} GiB")
    fix = "ray start --object-store-memory, or --set preprocess.num_samples_per_shard=N"
    detail += f"; shards in flight may take {needed / _GIB:.1f} GiB, the rest spills to disk"
    return Check(name, "warn", detail, fix)


def _check_clock(answer: NodeResult[list[Check]]) -> Check:
    """Check the offset of a node's clock from the driver's."""
    ahead_s, error_s = answer.clock_ahead_s, answer.clock_error_s
    detail = f"{ahead_s:+.3f} s from the driver's (within {error_s:.3f} s)"
    skew_s = max(abs(ahead_s) - error_s, 0.0)
    if skew_s < _GOOD_CLOCK_SKEW_S:
        return Check("clock", "ok", detail)
    fix = "synchronize the clocks of all nodes with chrony or ntpd"
    return Check("clock", "warn" if skew_s < _MAX_CLOCK_SKEW_S else "fail", detail, fix)


def _describe(node: Node) -> str:
    gpus = f", {node.num_gpus:g} accelerators" if node.num_gpus else ""
    memory = f"{node.memory_bytes / _GIB:.1f} GiB"
    return f"{node.address} {node.node_id[:8]}: {node.num_cpus:g} cores{gpus}, {memory}"


@contextlib.contextmanager
def _probes(request: ClusterRequest) -> Iterator[tuple[tuple[Probe, ...], list[Check]]]:
    """Keep a probe file in each directory while the nodes check; also yield rows of failures."""
    content = secrets.token_bytes(64)
    file = f"d2i-probe-{content[:8].hex()}"
    probes, problems = [], []
    for url in map(storage.resolve, request.storage_urls):
        try:
            storage.write_bytes(storage.join(url, file), content)
            probes.append(Probe(url, file, content))
        except (OSError, D2IError) as err:
            fix = "check the URL, and this machine's write permission there"
            detail = f"the driver cannot write: {first_line(err)}"
            problems.append(Check(f"storage {url}", "fail", detail, fix))
            probes.append(Probe(url, None, content))
    try:
        yield tuple(probes), problems
    finally:
        for probe in probes:
            if probe.name:
                storage.remove(storage.join(probe.url, probe.name))
