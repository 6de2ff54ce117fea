"""A preprocessing job in which a process is killed: the program of the kill matrix.

    python -m tests.integration.killing '{"victim": "node", "point": "shard.tar", ...}'

The fault kills this process (driver), the worker that reaches the point, or that worker's node.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2i.cluster import Session
from d2i.fault_injection import Fault
from d2i.fetch.sources import NetworkPolicy
from d2i.preprocess.job import PreprocessRequest, preprocess
from d2i.recipes import resolve_recipe


@dataclass
class Killing(Fault):
    """Kills once in the whole job, even if the counter of passes dies with its node."""

    victim: str = "worker"
    driver: int = 0
    done: str = ""

    def act(self) -> None:
        if Path(self.done).exists():
            return
        victims = {"driver": [self.driver], "worker": [os.getpid()]}.get(self.victim)
        if victims is None:
            raylet = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
            assert b"raylet" in raylet
            # The head node stands for the driver's own machine, which dies as a whole.
            victims = [os.getppid(), *([self.driver] if b"--head" in raylet else [])]
        Path(self.done).write_text("driver" if self.driver in victims else "other")
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        # Wait until the death of the node reaches this process.
        signal.pause()


def run_job(values: dict[str, Any], session: Session) -> None:
    """Run the job."""
    recipe = resolve_recipe("demo", values["settings"])
    request = PreprocessRequest("jsonl", values["source"], values["out"], recipe)
    network_policy = NetworkPolicy(frozenset({values["host"]}))
    preprocess(request, session, print, network_policy=network_policy)


@contextmanager
def two_nodes() -> Iterator[str]:
    """Start two Ray nodes of one core each; yield their address."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.add_node(**node)
    try:
        yield cluster.address
    finally:
        cluster.shutdown()


def main() -> None:
    values = json.loads(sys.argv[1])
    fault = Killing(
        values["point"], "kill", values["nth"], 0, values["victim"], os.getpid(), values["done"]
    )
    if values["victim"] == "node":
        with two_nodes() as address, Session(2, address, fault) as session:
            run_job(values, session)
    else:
        with Session(2, fault=fault) as session:
            run_job(values, session)


if __name__ == "__main__":
    main()
