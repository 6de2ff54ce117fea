"""Ray nodes of one machine that share nothing but its disk, each started by `ray start`.

Each node has its own address, working directory, temporary directory and object store. It also has
its own network namespace if this user may create one, else a loopback address.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

RAY = str(Path(sys.executable).with_name("ray"))
WAIT_S = 240.0


class Namespaces:
    """A network of namespaces; its bridge is in the first one, not in the machine's."""

    def __init__(self) -> None:
        self._name = f"d2i{os.getpid()}"
        self._num_nodes = 0

    @staticmethod
    def are_allowed() -> bool:
        asked = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False)
        return os.geteuid() == 0 and asked.returncode == 0 and shutil.which("ip") is not None

    def add(self) -> tuple[str, list[str]]:
        """Return the address of a new namespace, and the prefix that runs a command in it."""
        number, own, first = self._num_nodes, f"{self._name}-{self._num_nodes}", f"{self._name}-0"
        self._num_nodes += 1
        address = f"10.77.0.{number + 1}"
        _ip("netns", "add", own)
        _ip("-n", own, "link", "set", "lo", "up")
        if number == 0:
            _ip("-n", own, "link", "add", "eth0", "type", "bridge")
        else:
            port = f"port{number}"
            peer = ("peer", "name", "eth0", "netns", own)
            _ip("-n", first, "link", "add", port, "type", "veth", *peer)
            _ip("-n", first, "link", "set", port, "master", "eth0", "up")
        _ip("-n", own, "address", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", own, "link", "set", "eth0", "up")
        return address, ["ip", "netns", "exec", own]

    def remove(self) -> None:
        for number in range(self._num_nodes):
            _ip("netns", "delete", f"{self._name}-{number}")


class Loopback:
    """Loopback addresses, for users who may not create namespaces."""

    def __init__(self) -> None:
        self._num_nodes = 0

    def add(self) -> tuple[str, list[str]]:
        """Return an address that no other node has; commands need no prefix."""
        self._num_nodes += 1
        return f"127.0.0.{self._num_nodes + 1}", []

    def remove(self) -> None:
        """Do nothing: nothing was created."""


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@dataclass
class Node:
    """One started node."""

    address: str
    prefix: list[str]
    process: subprocess.Popen[bytes]
    directory: Path

    def said(self, words: str) -> bool:
        """Return whether a worker of the node has written this to stderr."""
        logs = self.directory.glob("ray/session_*/logs/worker-*.err")
        return any(words in log.read_text() for log in logs)

    def kill(self) -> None:
        """SIGKILL every process of the node, as when its machine dies."""
        for pid in [self.process.pid, *_descendants(self.process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


class RayNodes:
    """A cluster with token authentication: a head node without cores for tasks, and added nodes."""

    def __init__(
        self, directory: Path, network: Namespaces | Loopback, names: Mapping[str, str]
    ) -> None:
        self._directory, self._network = directory, network
        self._port, self._dashboard_port = _free_ports(2)
        self.environment = {
            **os.environ,
            **names,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
        self.nodes: list[Node] = []
        dashboard = ("--dashboard-port", str(self._dashboard_port))
        self._head = self._start(0, "--head", "--port", str(self._port), *dashboard)
        wait_until(self._answers, self._head)

    def add(self, num_cpus: int = 1) -> Node:
        """Start one more node."""
        return self._start(num_cpus, "--address", f"{self._head.address}:{self._port}")

    def submit(self, *words: object) -> subprocess.Popen[str]:
        """Submit a command with `ray job submit` from the head node's network."""
        address = f"http://{self._head.address}:{self._dashboard_port}"
        line = [RAY, "job", "submit", "--address", address, "--", *map(str, words)]
        return subprocess.Popen(
            [*self._head.prefix, *line],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _start(self, num_cpus: int, *role: str) -> Node:
        address, prefix = self._network.add()
        if role[0] == "--head":
            role = (*role, "--dashboard-host", address)
        directory = self._directory / str(len(self.nodes))
        directory.mkdir()
        line = [RAY, "start", "--block", "--node-ip-address", address, *role]
        line += ["--temp-dir", str(directory / "ray"), "--num-cpus", str(num_cpus)]
        line += ["--object-store-memory", str(80 << 20)]
        line += ["--dashboard-agent-listen-port", str(*_free_ports(1))]
        with (directory / "log").open("w") as log:
            process = subprocess.Popen(
                [*prefix, *line], cwd=directory, env=self.environment, stdout=log, stderr=log
            )
        self.nodes.append(Node(address, prefix, process, directory))
        return self.nodes[-1]

    def _answers(self) -> bool:
        """Return whether the cluster accepts jobs, which it does once the token is checked."""
        address = f"http://{self._head.address}:{self._dashboard_port}"
        line = [*self._head.prefix, RAY, "job", "list", "--address", address]
        asked = subprocess.run(line, env=self.environment, capture_output=True, check=False)
        return asked.returncode == 0


@contextmanager
def ray_nodes(names: Mapping[str, str]) -> Iterator[RayNodes]:
    """Start a cluster of a head node alone; added nodes end with it.

    Args:
        names: Environment variables of every node, besides those set here.
    """
    network = Namespaces() if Namespaces.are_allowed() else Loopback()
    # It holds Ray's sockets, whose paths are limited in length.
    directory = Path(tempfile.mkdtemp(prefix="nodes", dir="/tmp"))
    nodes: list[Node] = []
    try:
        cluster = RayNodes(directory, network, names)
        nodes = cluster.nodes
        yield cluster
    finally:
        for node in nodes:
            node.kill()
        network.remove()
        shutil.rmtree(directory)


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen[str] | Node) -> None:
    """Wait for a condition that a process brings about; fail if the process ends before."""
    deadline = time.monotonic() + WAIT_S
    running = process.process if isinstance(process, Node) else process
    while not is_so():
        assert running.poll() is None, "it ended before"
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found, waiting = [], [pid]
    while waiting:
        waiting += (mine := children.get(waiting.pop(), []))
        found += mine
    return found
