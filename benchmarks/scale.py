"""Simulated time of a job on a cluster, its bottleneck, and the first limit as it grows.

    python benchmarks/scale.py predict --job preprocess-files --num-instances 1e7 --nodes 16
    python benchmarks/scale.py check
    python benchmarks/scale.py table --into docs/scale.md

A discrete-event simulation: tasks go from producers to consumers as in d2i's pipeline, and wait for
accelerators, cores, the network, the object store, hosts, the shared rate limiter and the driver.
Nodes fail at regular intervals, and their tasks in progress are repeated. The numbers are measured
by `scale_costs.py` (benchmarks/results/scale.json), counted, or assumed hardware rates, which are
given with their source.

`predict` prints one JSON line for a job; `check` one with predicted and measured times of commands
that were held out of the fit; `table` prints the tables of docs/scale.md, or writes them there.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

COSTS = Path(__file__).parent / "results" / "scale.json"
OTHER_COSTS = {name: COSTS.with_name(f"{name}.json") for name in ("corpus", "training")}
SIZES = (1_000_000, 10_000_000, 100_000_000)
NODES = (1, 4, 16, 64, 256)
MMDIALOG_TEST = 23_772
"""MMDialog's test instances, as the paper counts them."""
BEGIN, END = "<!-- what scale.py prints: begin -->\n", "<!-- what scale.py prints: end -->\n"
DAY_S = 86_400.0
_GOLDEN = (5**0.5 - 1) / 2

Kind = Literal["measured", "counted", "assumed"]


@dataclass(frozen=True)
class Number:
    """An input number of the simulation.

    Args:
        value: The value, in `unit`.
        unit: The unit, and what it is per.
        kind: Measured, counted or assumed.
        source: The benchmark, code or publication that it is from.
    """

    value: float
    unit: str
    kind: Kind
    source: str


def assumed(value: float, unit: str, source: str) -> Number:
    """Return an assumed number."""
    return Number(value, unit, "assumed", source)


def counted(value: float, unit: str, source: str) -> Number:
    """Return a number that follows from the code or the formats."""
    return Number(value, unit, "counted", source)


_P4D = "as AWS p4d.24xlarge"
_FLOPS = "torch's FlopCounterMode, 2 a multiply-add"
GIVEN = {
    "accelerators": assumed(8, "accelerators a node", _P4D),
    "cores": assumed(96, "cores a node", _P4D),
    "node_bytes": assumed(1.152e12, "bytes of memory a node", _P4D),
    "disk_bytes": assumed(8e12, "bytes of local disk a node", _P4D),
    "driver_bytes": assumed(128e9, "bytes of memory for the driver", "a node without accelerators"),
    "link": assumed(12.5e9, "bytes a second to and from a node", "100 Gbit/s"),
    "device_link": assumed(300e9, "bytes a second between the accelerators of a node", "NVLink"),
    "hop_s": assumed(1e-4, "seconds a doubling of the nodes, in each exchange", "no figure found"),
    "bf16_flop": assumed(312e12, "FLOP a second of an accelerator in bf16", "A100's data sheet"),
    "fp32_flop": assumed(19.5e12, "the same in float32 without TF32", "A100's data sheet"),
    "encoder_share": assumed(0.27, "of that in encoders", "Mosaic's SD2 precompute, derived"),
    "network_share": assumed(0.4, "of that in training and sampling", "ambitious, seen in ViTs"),
    "gets": assumed(5500, "object-store reads a second under one prefix", "AWS's S3 guide"),
    "puts": assumed(3500, "object-store writes a second under one prefix", "AWS's S3 guide"),
    "largest_put": assumed(5e9, "bytes of an object written by one request", "AWS's S3 guide"),
    "store_answer_s": assumed(0.03, "seconds until the store has answered", "no figure found"),
    "store_error_share": assumed(0.01, "of requests fail and are repeated", "no figure found"),
    "image_bytes": assumed(30_000, "bytes of an image file", "img2dataset: 29.9 GB a million"),
    "answer_s": assumed(0.5, "seconds until a URL answers", "no figure found"),
    "busiest_host": assumed(0.01, "of all URLs are on the busiest host", "no figure found"),
    "passing_share": assumed(0.05, "of URLs are requested twice", "no figure found"),
    "dead_share": assumed(0.05, "of URLs are on dead hosts", "no figure found"),
    "dead_wait_s": assumed(3.0, "seconds for a URL of a dead host", "ten a host, three time out"),
    "spread": assumed(0.5, "of its time a shard's feeding is longer or shorter", "no figure found"),
    "lost_every_s": assumed(30 * DAY_S, "seconds until a node is lost", "no figure found"),
    "replaced_s": assumed(300.0, "seconds until another is in its place", "no figure found"),
    "too_long_s": assumed(30 * DAY_S, "seconds that a job may take", "our default"),
    "shard_samples": counted(1000, "samples a shard", "preprocess.num_samples_per_shard"),
    "shard_numbers": counted(1e6, "shards at most", "their names have six digits"),
    "shard_puts": counted(4, "objects that a worker writes for a shard", "d2i/shards/writer.py"),
    "passes": counted(4, "passes of the driver over all shards' small files", "preprocess/job.py"),
    "ledger_passes": counted(2, "of them over the ledgers", "preprocess/job.py"),
    "file_requests": counted(2, "requests to read a file; one in a tar", "s3fs: HEAD and GET"),
    "requests_at_once": counted(32, "small files read at once", "d2i/io/storage.py"),
    "mapped_shards": counted(13_106, "shards mapped at once", "vm.max_map_count / 5"),
    "block_images": counted(16, "images in a block", "preprocess/workers/fetch_worker.py"),
    "handed_bytes": counted(196_608, "bytes of a decoded image", "256 x 256 x 3"),
    "uvit_sample_bytes": counted(135_834, "bytes of a sample", "256 pixels, 77 x 768 text"),
    "uni_sample_bytes": counted(76_570, "bytes of a sample", "512 pixels, 77 x 64 text"),
    "host_per_s": counted(20, "requests a second to one host", "fetch.max_host_requests_per_s"),
    "concurrent_requests": counted(16, "concurrent requests of a worker", "fetch.num_threads"),
    "limiter_calls": counted(2, "rate limiter calls per URL", "fetch/downloader.py"),
    "limiter_cores": counted(16, "cores per rate limiter", "fetch/rate_limiter.py"),
    "limiters": counted(16, "rate limiters at most", "fetch/rate_limiter.py"),
    "inception_bytes": counted(1.86, "times the bytes to score CLIP's features", "2,048 for 512"),
    "readers": counted(2, "reading threads a rank", "train.num_reader_threads"),
    "checkpoint_steps": counted(1000, "steps between checkpoints", "train.num_checkpoint_steps"),
    "encode_flop": counted(294.8e9, "FLOP to encode a sample at 256 pixels", _FLOPS),
    "uvit_step_flop": counted(97.31e9, "FLOP of a step of U-ViT-S, an image", _FLOPS),
    "uvit_sample_flop": counted(3.87e12, "FLOP to generate an image with it", _FLOPS),
    "uvit_parameters": counted(44_692_644, "parameters of U-ViT-S", "its published weights"),
    "uni_step_flop": counted(9315e9, "FLOP of a step of UniDiffuser-v1, an image", _FLOPS),
    "uni_sample_flop": counted(235.4e12, "FLOP to generate an image with it", _FLOPS),
    "uni_parameters": counted(952_509_520, "parameters of UniDiffuser-v1", "its published weights"),
}


class Costs:
    """All numbers by name: assumed, counted, and measured in small jobs."""

    def __init__(self, numbers: dict[str, Number], record: dict[str, Any]) -> None:
        self.numbers = numbers
        self.record = record

    def __getattr__(self, name: str) -> float:
        """Return a number's value."""
        numbers: dict[str, Number] = self.__dict__.get("numbers", {})
        if name not in numbers:
            raise AttributeError(name)
        return numbers[name].value

    def but(self, **values: float) -> Costs:
        """Return a copy with other values."""
        changed = {name: replace(self.numbers[name], value=v) for name, v in values.items()}
        return Costs({**self.numbers, **changed}, self.record)


@dataclass
class Line:
    """A FIFO queue of one server, for a shared resource."""

    free_s: float = 0.0
    busy_s: float = 0.0

    def serve(self, begun_s: float, ready_s: float, work_s: float) -> float:
        """Serve a task, with its start and its end without contention; return when it is served."""
        self.free_s = max(self.free_s, begun_s) + work_s
        self.busy_s += work_s
        return max(ready_s, self.free_s)


@dataclass(frozen=True)
class Task:
    """Seconds of each resource that one task takes without contention.

    Args:
        feed_s: Of a producer.
        finish_s: Of a consumer.
        cores_s: Of one core, in producing and in consuming.
        link_s: Of a node's network, in producing and in consuming.
        shared_s: Of the resources shared by all nodes, by name, in producing and in consuming.
        spread: The largest relative deviation of the producing time: identical tasks would arrive
            in bursts forever.
    """

    feed_s: float
    finish_s: float
    cores_s: tuple[float, float] = (0.0, 0.0)
    link_s: tuple[float, float] = (0.0, 0.0)
    shared_s: tuple[dict[str, float], dict[str, float]] = field(default_factory=lambda: ({}, {}))
    spread: float = 0.0

    def times(self, num: float) -> Task:
        """Return several tasks merged into one."""

        def more(pair: tuple[float, float]) -> tuple[float, float]:
            return pair[0] * num, pair[1] * num

        feeding, finishing = ({k: v * num for k, v in part.items()} for part in self.shared_s)
        return Task(
            self.feed_s * num,
            self.finish_s * num,
            more(self.cores_s),
            more(self.link_s),
            (feeding, finishing),
            self.spread,
        )

    def nth_feed_s(self, number: int) -> float:
        """Return the producing time of one task: evenly spread by the golden ratio."""
        return self.feed_s * (1 + self.spread * (2 * (number * _GOLDEN % 1) - 1))


@dataclass(frozen=True)
class Site:
    """The cluster on which tasks run.

    Args:
        num_nodes: The number of identical nodes.
        num_cores: Cores per node.
        num_producers: On all nodes together; 0 if tasks need no producer.
        num_consumers: On all nodes together.
        lost_every_s: Seconds between two node failures in the whole cluster.
        replaced_s: Seconds until a node is replaced.
    """

    num_nodes: int
    num_cores: float
    num_producers: int
    num_consumers: int
    lost_every_s: float = math.inf
    replaced_s: float = 0.0


@dataclass(frozen=True)
class Flow:
    """The result of simulated tasks.

    Args:
        time_s: Seconds until the last task finished.
        marks_s: The time at which each task finished.
        busy_s: Busy seconds per unit of each resource, without work lost to node failures.
    """

    time_s: float
    marks_s: list[float]
    busy_s: dict[str, float]


class Flowing:
    """The simulation of tasks on a site, by the rules of d2i's `Session.pipeline`."""

    def __init__(self, task: Task, num_tasks: int, site: Site) -> None:
        self.task, self.site = task, site
        self.num_left = num_tasks
        self.num_waiting, self.num_fed = (num_tasks, 0) if site.num_producers else (0, num_tasks)
        self.idle = {
            "feed": deque(range(site.num_producers)),
            "finish": deque(range(site.num_consumers)),
        }
        self.running: dict[tuple[str, int], float] = {}
        self.times_lost = [0] * site.num_nodes
        self.cores = [Line() for _ in range(site.num_nodes)]
        self.links = [Line() for _ in range(site.num_nodes)]
        self.shared = {name: Line() for part in task.shared_s for name in part}
        self.events: list[tuple[float, int, str, int, int]] = []
        self.num_events = self.num_lost = 0
        self.work_s = {"feed": 0.0, "finish": 0.0}
        self.marks_s: list[float] = []

    def run(self) -> Flow:
        """Process all events in order."""
        now_s = 0.0
        if self.site.lost_every_s < math.inf:
            self._note(self.site.lost_every_s, "lost", 0)
        while self.num_left:
            self._give_out(now_s)
            now_s, _, kind, lane, times_lost = heapq.heappop(self.events)
            if kind == "lost":
                self._lose_node(now_s, lane)
            elif kind == "replaced":
                self._take_back(lane)
            elif times_lost == self.times_lost[lane % self.site.num_nodes]:
                self._take(now_s, kind, lane)
        return Flow(now_s, self.marks_s, self._busy())

    def _note(self, time_s: float, kind: str, lane: int) -> None:
        self.num_events += 1
        times_lost = self.times_lost[lane % self.site.num_nodes]
        heapq.heappush(self.events, (time_s, self.num_events, kind, lane, times_lost))

    def _give_out(self, now_s: float) -> None:
        """Assign tasks to idle workers, unless too many already wait for a consumer."""
        feeding, finishing = self.idle["feed"], self.idle["finish"]
        while self.num_fed and finishing:
            self.num_fed -= 1
            self._begin(now_s, "finish", finishing.popleft(), self.task.finish_s)
        while self.num_waiting and feeding and self.num_fed < self.site.num_consumers:
            self.num_waiting -= 1
            feed_s = self.task.nth_feed_s(self.num_waiting)
            self._begin(now_s, "feed", feeding.popleft(), feed_s)

    def _begin(self, now_s: float, kind: str, lane: int, work_s: float) -> None:
        part, node = ("feed", "finish").index(kind), lane % self.site.num_nodes
        self.running[kind, lane] = work_s
        cores_s = self.task.cores_s[part] / self.site.num_cores
        done_s = self.cores[node].serve(now_s, now_s + work_s, cores_s)
        done_s = self.links[node].serve(now_s, done_s, self.task.link_s[part])
        for name, shared_s in self.task.shared_s[part].items():
            done_s = self.shared[name].serve(now_s, done_s, shared_s)
        self._note(done_s, kind, lane)

    def _take(self, now_s: float, kind: str, lane: int) -> None:
        self.work_s[kind] += self.running.pop((kind, lane))
        self.idle[kind].append(lane)
        if kind == "feed":
            self.num_fed += 1
        else:
            self.num_left -= 1
            self.marks_s.append(now_s)

    def _lose_node(self, now_s: float, node: int) -> None:
        """Drop the node's tasks: shards are produced again, produced ones go to other consumers."""
        self.times_lost[node] += 1
        self.num_lost += 1
        for kind, lane in [one for one in self.running if one[1] % self.site.num_nodes == node]:
            del self.running[kind, lane]
            if kind == "finish":
                self.num_fed += 1
            else:
                self.num_waiting += 1
        for kind, lanes in self.idle.items():
            self.idle[kind] = deque(o for o in lanes if o % self.site.num_nodes != node)
        self._note(now_s + self.site.replaced_s, "replaced", node)
        self._note(now_s + self.site.lost_every_s, "lost", self.num_lost % self.site.num_nodes)

    def _take_back(self, node: int) -> None:
        numbers = {"feed": self.site.num_producers, "finish": self.site.num_consumers}
        for kind, lanes in self.idle.items():
            there = set(lanes) | {lane for of, lane in self.running if of == kind}
            mine = range(node, numbers[kind], self.site.num_nodes)
            lanes.extend(lane for lane in mine if lane not in there)

    def _busy(self) -> dict[str, float]:
        num_nodes = self.site.num_nodes
        return {
            "feeders": self.work_s["feed"] / max(self.site.num_producers, 1),
            "finishers": self.work_s["finish"] / self.site.num_consumers,
            "cores": sum(line.busy_s for line in self.cores) / num_nodes,
            "network": sum(line.busy_s for line in self.links) / num_nodes,
            **{name: line.busy_s for name, line in self.shared.items()},
        }


def flow(task: Task, num_tasks: int, site: Site) -> Flow:
    """Simulate tasks on a site; merge many rounds into fewer, longer ones (our approximation).

    At least sixteen rounds remain, and tasks take at most a hundredth of a node's time to failure.
    """
    num_lanes = max(site.num_consumers, site.num_producers)
    longest_s = max(task.feed_s, task.finish_s)
    lost_every_s = site.lost_every_s * site.num_nodes
    num_rounds = max(16, math.ceil(100 * num_tasks * longest_s / num_lanes / lost_every_s))
    num_simulated = min(num_tasks, num_rounds * num_lanes)
    return Flowing(task.times(num_tasks / num_simulated), num_simulated, site).run()


@dataclass(frozen=True)
class Outcome:
    """The predicted time and bottleneck of a job.

    Args:
        time_s: Seconds of the whole command; infinite if it never ends.
        shares: The utilization of each resource, on average over its units.
        refused: The reason why d2i would reject the job.
    """

    time_s: float
    shares: dict[str, float]
    refused: str = ""

    @property
    def bottleneck(self) -> str:
        """The resource with the highest utilization."""
        return max(self.shares, key=lambda name: self.shares[name]) if self.shares else ""


def outcome(start_s: float, driver_s: float, going: Flow, names: dict[str, str]) -> Outcome:
    """Combine the parts of a job: startup, the driver's serial work, the simulated tasks."""
    time_s = start_s + driver_s + going.time_s
    busy_s = {names.get(name, name): seconds for name, seconds in going.busy_s.items()}
    busy_s["driver"] = busy_s.get("driver", 0.0) + driver_s
    busy_s["start"] = start_s
    busy_s.pop("", None)
    return Outcome(time_s, {name: seconds / time_s for name, seconds in busy_s.items()})


def site_of(costs: Costs, num_nodes: int, start_s: float, *, is_fed: bool) -> Site:
    """Return a cluster of the assumed nodes; cores that serve no accelerator run producers."""
    num_accelerators = int(costs.accelerators) * num_nodes
    num_cores = int(costs.cores) * num_nodes
    return Site(
        num_nodes=num_nodes,
        num_cores=costs.cores,
        num_producers=num_cores - num_accelerators if is_fed else 0,
        num_consumers=num_accelerators,
        lost_every_s=costs.lost_every_s / num_nodes,
        replaced_s=costs.replaced_s + start_s,
    )


def preprocess(
    costs: Costs, num: int, num_nodes: int, *, flop_per_s: float, by_url: bool
) -> Outcome:
    """Simulate `d2i preprocess` at 256 pixels, with text latents."""
    size = costs.shard_samples
    num_shards = math.ceil(num / size)
    encode_s = costs.encode_flop / (flop_per_s * costs.encoder_share)
    write_s = size * costs.sample_s + costs.shard_s
    open_s = size * costs.feed_s * costs.preprocess_slow
    feeding, wait_s = _fetching(costs, size, num_nodes, by_url=by_url)
    feeding["driver"] = size / costs.block_images * costs.block_s
    puts = costs.shard_puts * (1 + costs.store_error_share)
    task = Task(
        feed_s=max(open_s, wait_s),
        finish_s=size * encode_s + write_s,
        cores_s=(open_s, write_s),
        link_s=(
            size * (costs.image_bytes + costs.handed_bytes) / costs.link,
            size * costs.uvit_sample_bytes / costs.link,
        ),
        shared_s=(feeding, {"writes to the store": puts / costs.puts, "driver": costs.task_s}),
        spread=costs.spread,
    )
    going = flow(task, num_shards, site_of(costs, num_nodes, costs.preprocess_start_s, is_fed=True))
    asking_s = costs.passes * costs.file_requests * costs.store_answer_s / costs.requests_at_once
    driver_s = num * (costs.plan_s + costs.ledger_passes * costs.look_through_s)
    driver_s += num_shards * (costs.fold_s + asking_s)
    names = {"finishers": "accelerators", "feeders": "answers" if wait_s > open_s else ""}
    return outcome(costs.preprocess_start_s, driver_s, going, names)


def _fetching(
    costs: Costs, size: float, num_nodes: int, *, by_url: bool
) -> tuple[dict[str, float], float]:
    """Return the shared resources that fetching a shard takes, and the seconds its worker waits."""
    if not by_url:
        num_requests = size * costs.file_requests * (1 + costs.store_error_share)
        return {"reads of the store": num_requests / costs.gets}, 0.0
    num_requests = size * (1 + costs.passing_share)
    waited_s = num_requests * costs.answer_s + size * costs.dead_share * costs.dead_wait_s
    num_limiters = min(costs.limiters, costs.cores * num_nodes / costs.limiter_cores)
    calls_per_s = num_limiters * costs.shared_calls_per_s
    shared_s = {
        "rate limit of hosts": num_requests * costs.busiest_host / costs.host_per_s,
        "rate limiters": num_requests * costs.limiter_calls / calls_per_s,
    }
    return shared_s, waited_s / costs.concurrent_requests


@dataclass(frozen=True)
class Network:
    """A network in training and in sampling, by the names of its numbers.

    Args:
        batch: The global batch size of its recipe (paper, Table 5).
        task: Images per task: its recipe's compute batch size.
    """

    name: str
    batch: int
    task: int


UVIT, UNIDIFFUSER = Network("uvit", 4096, 50), Network("uni", 800, 8)


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step, by resource."""

    accelerators: float
    exchange: float
    cores: float
    network: float

    @property
    def time_s(self) -> float:
        """Reading and fetching overlap the step; the all-reduce follows it (our assumption)."""
        return max(self.accelerators + self.exchange, self.cores, self.network)


def step_of(costs: Costs, network: Network, num: int, num_nodes: int) -> Step:
    """Return the seconds of each resource per step, with `train.order=global`."""
    num_ranks = int(costs.accelerators) * num_nodes
    num_bytes = 2 * costs.numbers[f"{network.name}_parameters"].value
    flop = costs.numbers[f"{network.name}_step_flop"].value
    sample_bytes = costs.numbers[f"{network.name}_sample_bytes"].value
    within_s = 2 * num_bytes / costs.device_link
    # A ring all-reduce sends twice the gradients, except a node's own part.
    between_s = 2 * num_bytes * (num_nodes - 1) / num_nodes / costs.link
    per_rank = network.batch / num_ranks
    unmapped = max(1 - costs.mapped_shards * costs.shard_samples / num, 0.0)
    return Step(
        accelerators=per_rank * flop / (costs.bf16_flop * costs.network_share),
        exchange=within_s + between_s + costs.hop_s * math.log2(num_nodes),
        cores=per_rank * (costs.read_s + unmapped * costs.map_s) / costs.readers,
        # Each node reads all shards, because its ranks read samples of the whole window.
        network=network.batch * sample_bytes / costs.link,
    )


def train(costs: Costs, num: int, num_nodes: int, *, network: Network) -> Outcome:
    """Simulate `d2i train`: one epoch."""
    num_ranks = int(costs.accelerators) * num_nodes
    if network.batch % num_ranks:
        why = f"{num_ranks} ranks cannot share a batch of {network.batch}"
        return Outcome(math.inf, {}, refused=why)
    step = step_of(costs, network, num, num_nodes)
    num_steps = math.ceil(num / network.batch)
    start_s = costs.train_start_s + num * costs.order_s
    start_s += num / costs.shard_samples * costs.open_s
    hold_s = costs.hold_s * costs.numbers[f"{network.name}_parameters"].value / num_ranks
    walk = Walk(
        step_s=step.time_s,
        hold_s=hold_s,
        num_checkpoint_steps=int(costs.checkpoint_steps),
        lost_every_s=costs.lost_every_s / num_nodes,
        back_s=costs.replaced_s + start_s,
    )
    walked_s = walk.time_s(num_steps)
    time_s = start_s + walked_s
    if time_s == math.inf:
        return Outcome(math.inf, {"lost nodes": 1.0})
    shares = {
        "accelerators": num_steps * step.accelerators / time_s,
        "network": num_steps * max(step.exchange, step.network) / time_s,
        "cores": num_steps * step.cores / time_s,
        "lost nodes": max(walked_s - num_steps * step.time_s, 0.0) / time_s,
        "start": start_s / time_s,
    }
    return Outcome(time_s, shares)


@dataclass(frozen=True)
class Walk:
    """Training steps with checkpoints, resumed from the last one after a node failure.

    Args:
        step_s: Seconds of a step.
        hold_s: Seconds for which a checkpoint blocks training.
        num_checkpoint_steps: Steps between two checkpoints.
        lost_every_s: Seconds between two node failures in the whole cluster.
        back_s: Seconds until training resumes after a failure.
    """

    step_s: float
    hold_s: float
    num_checkpoint_steps: int
    lost_every_s: float
    back_s: float

    def time_s(self, num_steps: int) -> float:
        """Return the seconds; infinite if no checkpoint is reached between two failures."""
        now_s, next_lost_s, done = 0.0, self.lost_every_s, 0
        while done < num_steps:
            part = min(self.num_checkpoint_steps, num_steps - done)
            part_s = part * self.step_s + self.hold_s
            if now_s + part_s <= next_lost_s:
                now_s, done = now_s + part_s, done + part
                continue
            if part_s + self.back_s > self.lost_every_s:
                return math.inf
            now_s = next_lost_s + self.back_s
            next_lost_s += self.lost_every_s
        return now_s


def evaluate(costs: Costs, num: int, num_nodes: int, *, network: Network) -> Outcome:
    """Simulate `d2i eval --parallel` for a number of test instances."""
    flop = costs.numbers[f"{network.name}_sample_flop"].value
    num_bytes = costs.numbers[f"{network.name}_sample_bytes"].value + costs.image_bytes
    draw_s = flop / (costs.bf16_flop * costs.network_share)
    measure_s = network.task * costs.feed_s * costs.preprocess_slow
    # Each node keeps its own copies of shards.
    reads = costs.file_requests * network.task / costs.shard_samples / costs.gets
    task = Task(
        feed_s=0.0,
        finish_s=network.task * draw_s + measure_s,
        cores_s=(0.0, measure_s),
        link_s=(0.0, network.task * num_bytes / costs.link),
        shared_s=({}, {"driver": costs.pool_task_s, "reads of the store": reads}),
    )
    num_tasks = math.ceil(num / network.task)
    going = flow(task, num_tasks, site_of(costs, num_nodes, costs.eval_start_s, is_fed=False))
    driver_s = costs.score_fixed_s + num * costs.score_s
    names = {"finishers": "accelerators", "feeders": ""}
    return outcome(costs.eval_start_s, driver_s, going, names)


Simulation = Callable[[Costs, int, int], Outcome]


@dataclass(frozen=True)
class Case:
    """A kind of simulated job."""

    title: str
    simulate: Simulation
    sizes: tuple[int, ...] = SIZES


def _preprocess_case(title: str, *, flop: str, by_url: bool) -> Case:
    def simulate(costs: Costs, num: int, num_nodes: int) -> Outcome:
        flop_per_s = costs.numbers[flop].value
        return preprocess(costs, num, num_nodes, flop_per_s=flop_per_s, by_url=by_url)

    return Case(title, simulate)


CASES = {
    "preprocess-files": _preprocess_case(
        "Preprocessing images from an object store, encoders in bf16",
        flop="bf16_flop",
        by_url=False,
    ),
    "preprocess-files-fp32": _preprocess_case(
        "Preprocessing images from an object store, encoders in float32 (the default)",
        flop="fp32_flop",
        by_url=False,
    ),
    "preprocess-urls": _preprocess_case(
        "Preprocessing images by URL, encoders in bf16", flop="bf16_flop", by_url=True
    ),
    "train-uvit": Case(
        "Training U-ViT-S, one epoch at batch 4096",
        lambda costs, num, nodes: train(costs, num, nodes, network=UVIT),
    ),
    "train-unidiffuser": Case(
        "Training UniDiffuser-v1, one epoch at batch 800, 512 pixels",
        lambda costs, num, nodes: train(costs, num, nodes, network=UNIDIFFUSER),
    ),
    "eval-uvit": Case(
        "Evaluating U-ViT-S on so many test instances",
        lambda costs, num, nodes: evaluate(costs, num, nodes, network=UVIT),
        sizes=(MMDIALOG_TEST, *SIZES),
    ),
    "eval-unidiffuser": Case(
        "Evaluating UniDiffuser-v1 on so many test instances",
        lambda costs, num, nodes: evaluate(costs, num, nodes, network=UNIDIFFUSER),
        sizes=(MMDIALOG_TEST, *SIZES),
    ),
}


@dataclass(frozen=True)
class Limit:
    """A limit at which a job fails.

    Args:
        stage: The stage that fails.
        what: The resource, in words.
        num_instances: The number of instances from which on it fails.
        way_out: The remedy for the user.
    """

    stage: str
    what: str
    num_instances: float
    way_out: str


def limits(costs: Costs) -> list[Limit]:
    """Return all limits, by stage, the lowest first."""
    found = [*_preprocess_limits(costs), *_train_limits(costs), *_eval_limits(costs)]
    order = ["preprocess", "train", "eval"]
    return sorted(found, key=lambda limit: (order.index(limit.stage), limit.num_instances))


def _room(room: float, each: float) -> float:
    """Return how many fit; infinity if one takes nothing."""
    return room / each if each else math.inf


def _preprocess_limits(costs: Costs) -> Iterator[Limit]:
    size, days = costs.shard_samples, f"{costs.too_long_s / DAY_S:.0f} days"
    num = _room(costs.driver_bytes, costs.fold_bytes / size + costs.look_through_bytes)
    yield Limit("preprocess", "the driver's memory, at the end of a split", num, "--limit")
    num = _room(costs.largest_put, costs.manifest_bytes) * size
    yield Limit("preprocess", "the manifest, as one object", num, "larger shards")
    num = costs.shard_numbers * size
    yield Limit("preprocess", "the names of shards", num, "larger shards")
    asked = costs.too_long_s / (1 + costs.passing_share)
    num = asked * costs.host_per_s
    yield Limit("preprocess", f"one host's pace, in {days}", num, "files, or fetch.mirror")
    num = asked * costs.host_per_s / costs.busiest_host
    yield Limit("preprocess", f"the busiest host's pace, in {days}", num, "files")
    num = asked * costs.limiters * costs.shared_calls_per_s / costs.limiter_calls
    yield Limit("preprocess", f"the rate limiters, in {days}", num, "files")


def _train_limits(costs: Costs) -> Iterator[Limit]:
    size = costs.shard_samples
    num = costs.mapped_shards * size
    yield Limit("train", "maps: a shard is opened for nearly each sample", num, "order=blocked")
    num = _room(costs.disk_bytes, costs.uvit_sample_bytes)
    yield Limit("train", "a node's disk, for all shards", num, "train.order=blocked, --cache-gb")
    each = costs.order_bytes + costs.open_bytes / size
    num = _room(costs.node_bytes / costs.accelerators, each)
    yield Limit("train", "a node's memory, for order and manifest", num, "fewer ranks a node")


def _eval_limits(costs: Costs) -> Iterator[Limit]:
    num = _room(costs.driver_bytes, costs.score_bytes * costs.inception_bytes)
    yield Limit("eval", "the driver's memory, for scores", num, "fewer test instances")


def steady_s(marks_s: list[float], num_first: int = 4) -> float:
    """Return the seconds per unit after the first ones, during which workers still start."""
    return (marks_s[-1] - marks_s[num_first - 1]) / (len(marks_s) - num_first)


def _here(run: dict[str, Any], record: dict[str, Any]) -> tuple[Task, Site]:
    """Return a unit of a small job and the machine; a unit without measured parts takes 1 s."""
    stage, num_workers = run["stage"], run["num_workers"]
    num_cores, size = record["machine"]["cores"], record["unit_sizes"][stage]
    if stage == "preprocess":
        feed_s, finish_s = size * record["parts"]["feed_s"], size * record["parts"]["finish_s"]
        task = Task(feed_s, finish_s, cores_s=(feed_s, finish_s))
        return task, Site(1, num_cores, num_workers, num_workers)
    # All ranks of a training run take a step together.
    return Task(0.0, 1.0), Site(1, num_cores, 0, num_workers if stage == "eval" else 1)


def _unslowed(run: dict[str, Any], record: dict[str, Any]) -> Flow:
    task, site = _here(run, record)
    return Flowing(task, run["num_units"], site).run()


def fit(record: dict[str, Any]) -> dict[tuple[str, int], tuple[float, float]]:
    """Fit each stage and number of workers separately.

    Returns:
        The slowdown of a unit relative to its parts alone, and the seconds of the command outside
        its units: medians of the repeats.
    """
    by_kind: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for run in record["fitted"]:
        going = _unslowed(run, record)
        slow = steady_s(run["marks_s"]) / steady_s(going.marks_s)
        start_s = run["wall_s"] - slow * going.time_s
        by_kind.setdefault((run["stage"], run["num_workers"]), []).append((slow, start_s))
    return {
        kind: (statistics.median(s for s, _ in found), statistics.median(t for _, t in found))
        for kind, found in by_kind.items()
    }


def held_out(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return predicted and measured times of the held-out jobs."""
    fitted = fit(record)
    runs: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for run in record.get("held_out", []):
        runs.setdefault((run["stage"], run["num_workers"], run["times"]), []).append(run)
    found = []
    for (stage, num_workers, times), repeats in runs.items():
        slow, start_s = fitted[stage, num_workers]
        predicted_s = start_s + slow * _unslowed(repeats[0], record).time_s
        measured_s = statistics.median(run["wall_s"] for run in repeats)
        found.append(
            {
                "stage": stage,
                "workers": num_workers,
                "times": times,
                "predicted_s": round(predicted_s, 1),
                "measured_s": round(measured_s, 1),
                "error": round(predicted_s / measured_s - 1, 3),
            }
        )
    order = ["preprocess", "train", "eval"]
    return sorted(found, key=lambda row: (order.index(row["stage"]), row["times"]))


def _growth(parts: dict[str, Any], name: str, unit: str) -> tuple[float, float]:
    """Return slope and intercept of a cost, from the two sizes measured."""
    few, many = parts["growth"][name]
    slope = (many[unit] - few[unit]) / (many["num"] - few["num"])
    return max(slope, 0.0), max(few[unit] - slope * few["num"], 0.0)


def _measured(record: dict[str, Any]) -> dict[str, Number]:
    """Return the numbers measured by small jobs."""
    parts, fitted = record["parts"], fit(record)
    cores = record["machine"]["cores"]
    source = f"scale_costs.py fit, {cores} {record['machine']['processor']} cores"

    def told(value: float, unit: str) -> Number:
        return Number(value, unit, "measured", source)

    growth: dict[str, Number] = {}
    for name, what in GROWING.items():
        growth[f"{name}_s"] = told(_growth(parts, name, "seconds")[0], f"seconds {what}")
        growth[f"{name}_bytes"] = told(_growth(parts, name, "bytes")[0], f"bytes {what}")
    return {
        "feed_s": told(parts["feed_s"], "core seconds to read and decode an image"),
        "preprocess_slow": told(
            fitted["preprocess", 2][0], "times that, where all cores are at work"
        ),
        "sample_s": told(parts["sample_s"], "seconds to write a sample"),
        "shard_s": told(parts["shard_s"], "seconds to publish a shard"),
        "block_s": told(parts["block_s"], "seconds of the driver a block"),
        "task_s": told(parts["stages_task_s"], "seconds of the driver a shard"),
        "pool_task_s": told(parts["pool_task_s"], "seconds of the driver a task of an evaluation"),
        "shared_calls_per_s": told(
            parts["shared_calls_per_s"], "calls per second of a rate limiter"
        ),
        "map_s": told(parts["map_s"], "core seconds to map a shard of 1,000"),
        "preprocess_start_s": told(
            fitted["preprocess", 1][1], "seconds of preprocess beside shards"
        ),
        "train_start_s": told(fitted["train", 2][1], "seconds of train beside its steps"),
        "eval_start_s": told(fitted["eval", 1][1], "seconds of eval beside its tasks"),
        **growth,
        "manifest_bytes": told(
            _growth(parts, "manifest", "bytes")[0], "bytes a shard in the manifest"
        ),
        "score_fixed_s": told(_growth(parts, "score", "seconds")[1], "seconds of scores for none"),
        **_measured_before(),
    }


GROWING = {
    "fold": "a shard to fold the records",
    "open": "a shard to open a data set",
    "look_through": "an instance to look through the ledger",
    "order": "an instance for the orders of two epochs in turn",
    "score": "an instance to score",
}


def _measured_before() -> dict[str, Number]:
    """Return the numbers measured by other benchmarks."""
    corpus = json.loads(OTHER_COSTS["corpus"].read_text())["plan of all, train"]
    training = json.loads(OTHER_COSTS["training"].read_text())
    step = next(r for r in training if r["benchmark"] == "training step" and r["batch"] == 4)
    reading = next(r for r in training if r["benchmark"] == "training input")
    plan_s = corpus["seconds"] / corpus["count"]
    hold_s = step["checkpoint_stall_s"] / GIVEN["uvit_parameters"].value
    read_s = 1 / reading["samples_per_cpu_s"]
    return {
        "plan_s": Number(plan_s, "seconds to plan an instance", "measured", "corpus.py"),
        "read_s": Number(read_s, "core seconds to read a sample", "measured", "training.py input"),
        "hold_s": Number(
            hold_s, "seconds a parameter that a checkpoint holds up", "measured", "training.py step"
        ),
    }


def load_costs(path: Path = COSTS) -> Costs:
    """Return all costs: measured numbers read from a file, and the given ones."""
    record = json.loads(path.read_text())
    return Costs({**_measured(record), **GIVEN}, record)


def duration(seconds: float) -> str:
    """Format a duration in a suitable unit."""
    for unit, size, until in (("s", 1.0, 120), ("min", 60.0, 120), ("h", 3600.0, 72)):
        if seconds < until * size:
            shown = seconds / size
            return f"{shown:.1f} {unit}" if shown < 10 else f"{shown:.0f} {unit}"
    return f"{seconds / DAY_S:.0f} days"


def count(num: float) -> str:
    """Format a number in millions."""
    if num == math.inf:
        return "none found"
    return f"{num / 1e6:,.3g} M" if num < 1e9 else f"{num / 1e6:,.0f} M"


def _cell(found: Outcome) -> str:
    if found.refused:
        return "refused"
    if found.time_s == math.inf:
        return "never ends"
    return f"{duration(found.time_s)}, {found.bottleneck}"


def case_table(costs: Costs, case: Case) -> str:
    """Return one table: a row per size, a column per number of nodes."""
    heads = [f"{nodes} node{'s' * (nodes > 1)}" for nodes in NODES]
    lines = [f"| instances | {' | '.join(heads)} |", "|---" * (len(NODES) + 1) + "|"]
    for num in case.sizes:
        cells = [_cell(case.simulate(costs, num, nodes)) for nodes in NODES]
        lines.append(f"| {num:,} | {' | '.join(cells)} |")
    return f"### {case.title}\n\n" + "\n".join(lines) + "\n"


def limit_table(costs: Costs) -> str:
    """Return the table of limits and the sizes at which they are reached."""
    lines = ["| stage | what breaks | from so many instances on | way out |", "|---|---|---|---|"]
    lines += [
        f"| {one.stage} | {one.what} | {count(one.num_instances)} | {one.way_out} |"
        for one in limits(costs)
    ]
    return "### What breaks first\n\n" + "\n".join(lines) + "\n"


def check_table(record: dict[str, Any]) -> str:
    """Return the table of held-out jobs."""
    where, num = record["machine"], record["repeats"]
    repeats = "one run each" if num == 1 else f"medians of {num}"
    told = (
        f"{where['cores']} {where['processor']} cores, Python {where['python']}, "
        f"{record['beside']} running; {repeats}."
    )
    lines = ["| command, 2 workers | times the fitted size | predicted | measured | error |"]
    lines.append("|---|---|---|---|---|")
    for row in held_out(record):
        seconds = f"{row['predicted_s']:.1f} s | {row['measured_s']:.1f} s"
        lines.append(f"| `d2i {row['stage']}` | {row['times']} | {seconds} | {row['error']:+.0%} |")
    return f"### Predicted and measured\n\n{told}\n\n" + "\n".join(lines) + "\n"


def number_table(costs: Costs) -> str:
    """Return the table of all numbers with kind and source."""
    lines = ["| number | what | known | source |", "|---|---|---|---|"]
    lines += [
        f"| {one.value:.3g} | {one.unit} | {one.kind} | {one.source} |"
        for one in costs.numbers.values()
    ]
    return "### The numbers\n\n" + "\n".join(lines) + "\n"


def all_tables(costs: Costs) -> str:
    """Return all tables, as docs/scale.md holds them."""
    tables = [case_table(costs, case) for case in CASES.values()]
    return "\n".join([check_table(costs.record), *tables, limit_table(costs), number_table(costs)])


def put_into(page: Path, tables: str) -> None:
    """Replace the tables in a page."""
    before, _, rest = page.read_text().partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{tables}\n{END}{rest.partition(END)[2]}")


def predict(costs: Costs, job: str, num: int, num_nodes: int) -> dict[str, Any]:
    """Return the time, the bottleneck and the limits of one job."""
    found = CASES[job].simulate(costs, num, num_nodes)
    stage = job.partition("-")[0]
    broken = [one for one in limits(costs) if one.stage == stage]
    return {
        "job": job,
        "num_instances": num,
        "num_nodes": num_nodes,
        "time_s": round(found.time_s, 1) if found.time_s < math.inf else None,
        "refused": found.refused,
        "bottleneck": found.bottleneck,
        "shares": {name: round(share, 3) for name, share in found.shares.items()},
        "breaks": [one.what for one in broken if one.num_instances <= num],
        "breaks_next": next((one.what for one in broken if one.num_instances > num), None),
    }


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    asked = parser.add_subparsers(dest="asked", required=True)
    one = asked.add_parser("predict", help="one job, as a JSON line")
    one.add_argument("--job", choices=CASES, required=True)
    one.add_argument("--num-instances", type=float, required=True)
    one.add_argument("--nodes", type=int, required=True)
    check = asked.add_parser("check", help="predicted and measured times, as a JSON line")
    table = asked.add_parser("table", help="all tables, as Markdown")
    table.add_argument("--into", type=Path, help="The page to write them into.")
    for command in (one, check, table):
        command.add_argument(
            "--costs", type=Path, default=COSTS, help="The JSON file of measured costs."
        )
    return parser


def main() -> None:
    """Run the requested subcommand."""
    options = build_parser().parse_args()
    costs = load_costs(options.costs)
    if options.asked == "predict":
        print(json.dumps(predict(costs, options.job, int(options.num_instances), options.nodes)))
    elif options.asked == "check":
        print(json.dumps({"machine": costs.record["machine"], "held_out": held_out(costs.record)}))
    elif options.into:
        put_into(options.into, all_tables(costs))
    else:
        print(all_tables(costs))


if __name__ == "__main__":
    main()
