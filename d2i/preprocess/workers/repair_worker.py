"""The repair worker: remakes a damaged shard from its intact samples and newly made ones."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from d2i.errors import ShardError
from d2i.preprocess.ledger import count_failures
from d2i.preprocess.workers.encode_worker import Encoded, EncodeWorker, EncodeWorkerBuilder
from d2i.preprocess.workers.messages import FetchedBlock, ShardTask, receive
from d2i.preprocess.workers.spill_buffer import source_bytes
from d2i.shards import Commit, Sample, intact_samples, write_shard


@dataclass(frozen=True)
class RepairTask(ShardTask):
    """A shard to remake.

    Args:
        failures: Instances without a sample, by reason, as in its commit record.
        commit: Its commit record, if known: then only the exact shard is published, and the
            samples outside `keys` are kept.
    """

    failures: dict[str, int] = field(default_factory=dict)
    commit: Commit | None = None


@dataclass(frozen=True)
class RepairResult:
    """The outcome of a repair; `problem` is the reason why the shard is unchanged, or None."""

    name: str
    problem: str | None = None


@dataclass(frozen=True)
class RepairWorkerBuilder:
    """Picklable builder of the repair worker, called where the worker runs."""

    encode: EncodeWorkerBuilder

    def __call__(self) -> RepairWorker:
        """Load the encoders, which must be those that made the shards.

        Raises:
            ShardError: If existing shards were made with other weights, settings or versions.
        """
        return RepairWorker(self.encode())


class RepairWorker:
    """Holds the encoders; `run` remakes one shard and leaves its ledger unchanged."""

    def __init__(self, encode: EncodeWorker) -> None:
        self._encode = encode

    def run(self, task: RepairTask, blocks: Iterable[FetchedBlock]) -> RepairResult:
        """Publish the exact original shard, or return the reason why that is not possible."""
        instances, images = receive(blocks)
        with source_bytes(task.split_url) as sources:
            found = list(sources.taken_from(images))
            return self._publish(task, self._encode.encode(instances, found, sources))

    def _publish(self, task: RepairTask, made: Encoded) -> RepairResult:
        name = task.commit.name if task.commit else f"{task.index:06d}"
        lost = count_failures(made.rows)
        if lost and task.keys is not None:
            counts = ", ".join(f"{number} {reason}" for reason, number in lost.items())
            return RepairResult(
                name, f"some images could not be fetched or encoded again: {counts}"
            )
        try:
            commit = write_shard(
                _samples(task, made),
                task.split_url,
                task.index,
                failures=task.failures,
                fingerprint=self._encode.fingerprint,
                expected=task.commit,
                fault=self._encode.trigger_at,
            )
        except ShardError as err:
            return RepairResult(name, str(err))
        return RepairResult(commit.name)


def _samples(task: RepairTask, made: Encoded) -> Iterator[Sample]:
    """Merge intact samples with newly made ones, in key order."""
    whole = intact_samples(task.split_url, task.commit) if task.commit else iter(())
    kept = (sample for sample in whole if sample.key not in (task.keys or ()))
    return heapq.merge(kept, made.samples, key=lambda sample: sample.key)
