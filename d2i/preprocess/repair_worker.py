"""The repairing worker: a damaged shard again, of whole samples and of those made anew."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from d2i.errors import ShardError
from d2i.preprocess.encode_worker import Encoded, EncodeWorker, EncodeWorkerBuilder
from d2i.preprocess.ledger import count_failures
from d2i.preprocess.messages import FetchedImage, ShardTask
from d2i.preprocess.spill_buffer import source_bytes
from d2i.shards import Commit, Sample, intact_samples, write_shard


@dataclass(frozen=True)
class RepairTask(ShardTask):
    """A shard that is made again.

    Args:
        failures: What its record says of the instances that have no sample.
        commit: Its record, where that is known: then nothing else is published, and the samples
            outside `keys` are kept.
    """

    failures: dict[str, int] = field(default_factory=dict)
    commit: Commit | None = None


@dataclass(frozen=True)
class RepairResult:
    """What came of it; `problem` is why the shard is as it was, or None."""

    name: str
    problem: str | None = None


@dataclass(frozen=True)
class RepairWorkerBuilder:
    """Builds the worker where it runs; picklable."""

    encode: EncodeWorkerBuilder

    def __call__(self) -> RepairWorker:
        """Load the encoders, which must be those that the shards were made by.

        Raises:
            ShardError: If the shards there were made by other weights, settings or versions.
        """
        return RepairWorker(self.encode())


class RepairWorker:
    """Holds the encoders; `run` makes one shard again, its ledger left as it is."""

    def __init__(self, encode: EncodeWorker) -> None:
        self._encode = encode

    def run(self, task: RepairTask, blocks: Iterable[list[FetchedImage]]) -> RepairResult:
        """Publish the very shard that was there, or say why that is not possible."""
        with source_bytes(task.split_url) as sources:
            found = list(sources.taken_from(blocks))
            return self._publish(task, self._encode.encode(task.instances(), found, sources))

    def _publish(self, task: RepairTask, made: Encoded) -> RepairResult:
        name = task.commit.name if task.commit else f"{task.index:06d}"
        lost = count_failures(made.rows)
        if lost and task.keys is not None:
            counts = ", ".join(f"{number} {reason}" for reason, number in lost.items())
            return RepairResult(name, f"not every picture could be had again: {counts}")
        try:
            commit = write_shard(
                _samples(task, made),
                task.split_url,
                task.index,
                failures=task.failures,
                fingerprint=self._encode.fingerprint,
                expected=task.commit,
                fault=self._encode.reach,
            )
        except ShardError as err:
            return RepairResult(name, str(err))
        return RepairResult(commit.name)


def _samples(task: RepairTask, made: Encoded) -> Iterator[Sample]:
    """Merge whole samples with those made anew, in key order."""
    whole = intact_samples(task.split_url, task.commit) if task.commit else iter(())
    kept = (sample for sample in whole if sample.key not in (task.keys or ()))
    return heapq.merge(kept, made.samples, key=lambda sample: sample.key)
