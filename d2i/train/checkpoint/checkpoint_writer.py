"""Asynchronous checkpoint writing: the state is copied at once and written in a thread."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from d2i.config import TrainConfig
from d2i.fault_injection import Fault
from d2i.io import storage
from d2i.train.checkpoint.checkpoint_files import (
    Checkpoint,
    Kind,
    Progress,
    prune,
    remove_step,
    slice_key,
    step_directory,
    write_marker,
    write_part,
    written_ranks,
)
from d2i.train.checkpoint.ema import Ema, power_decay, warmup_decay
from d2i.train.distributed.engine import (
    Part,
    base_optimizer,
    list_parts,
    master_weights,
    restore_loss_scaler,
)
from d2i.train.distributed.ranks import Ranks
from d2i.train.failures import check_weights

_MOMENTS: tuple[Kind, ...] = ("exp_avg", "exp_avg_sq")
_POLL_S = 0.02
# Listing an object store costs money and time.
_FOREIGN_POLL_S = 1.0


@dataclass(frozen=True)
class TrainState:
    """The state that training changes: the master weights, their AdamW moments and averages."""

    engine: Any
    ema: Ema
    short_ema: Ema | None = None

    @property
    def averages(self) -> dict[Kind, Ema]:
        """The averages (EMA), by their kind in a checkpoint."""
        found: dict[Kind, Ema] = {"ema": self.ema}
        return found if self.short_ema is None else found | {"ema_short": self.short_ema}

    def update_averages(self) -> None:
        """Update every average with the weights after a step."""
        for average in self.averages.values():
            average.update()

    def tensors(self) -> dict[Kind, list[Tensor]]:
        """Return the float32 tensors of each kind, one for each master of this rank."""
        masters, state = master_weights(self.engine), base_optimizer(self.engine).state
        found: dict[Kind, list[Tensor]] = {"weight": masters}
        found |= {kind: average.tensors for kind, average in self.averages.items()}
        for kind in _MOMENTS:
            found[kind] = [state[master][kind] for master in masters]
        return found

    def num_updates(self) -> int:
        """Return AdamW's update count."""
        first = base_optimizer(self.engine).state[master_weights(self.engine)[0]]
        return int(first["step"].item())

    def copy_own_slices(self, ranks: Ranks) -> dict[str, Tensor]:
        """Copy this rank's slices to the CPU; slices that all ranks hold are divided among them."""
        tensors, runs = self.tensors(), {}
        for number, part in enumerate(list_parts(self.engine)):
            if part.is_shared and number % ranks.world_size != ranks.rank:
                continue
            for kind, of_kind in tensors.items():
                runs[slice_key(kind, part.name, part.start)] = _copied(part.of(of_kind))
        return runs

    def begin(self, num_updates: int = 0) -> None:
        """Initialize AdamW's moments to zero and set its update count."""
        for master in master_weights(self.engine):
            base_optimizer(self.engine).state[master] = {
                "exp_avg": torch.zeros_like(master, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(master, requires_grad=False),
                "step": torch.tensor(float(num_updates), device=master.device),
            }

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore this rank's part of the state; the network must have its weights already."""
        progress = checkpoint.progress
        self.begin(progress.num_updates)
        tensors = self.tensors()
        for part in list_parts(self.engine):
            for kind, of_kind in tensors.items():
                _fill(part, kind, of_kind, checkpoint)
        for average in self.averages.values():
            average.num_updates = progress.step
        restore_loss_scaler(self.engine, progress.loss_scale)


def build_state(engine: Any, config: TrainConfig) -> TrainState:
    """Return the initial state of a training, with the engine's current weights."""
    masters, length = master_weights(engine), config.short_ema_length
    rate = warmup_decay(config.ema_rate) if config.ema_warmup else config.ema_rate
    short_ema = None if length is None else Ema(masters, power_decay(length))
    state = TrainState(engine, Ema(masters, rate), short_ema)
    state.begin()
    return state


def _copied(numbers: Tensor) -> Tensor:
    return numbers.to("cpu", copy=True)


def _fill(part: Part, kind: Kind, tensors: list[Tensor], checkpoint: Checkpoint) -> None:
    part.of(tensors).copy_(checkpoint.read(kind, part.name, part.start, part.length))


class CheckpointWriter:
    """Writes one checkpoint at a time, in one thread on each rank.

    Args:
        run_url: The run directory, shared by all ranks.
        config: The number of checkpoints to keep.
        ranks: All ranks; each writes its own file.
        shapes: Shape of every parameter, by its published key.
        fault: Fault to inject in a test.
        base_sha256: Of the base model's network, where one is fine-tuned within its pipeline.
    """

    def __init__(
        self,
        run_url: str,
        config: TrainConfig,
        ranks: Ranks,
        shapes: Mapping[str, tuple[int, ...]],
        fault: Fault | None = None,
        base_sha256: str | None = None,
    ) -> None:
        self._base_sha256 = base_sha256
        self._run_url, self._config, self._ranks = run_url, config, ranks
        self._shapes, self._fault = shapes, fault
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-writer")
        self._pending: Future[None] | None = None
        self._abandoned = threading.Event()
        self._poll_s = _POLL_S if storage.local_path(run_url) else _FOREIGN_POLL_S

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop waiting for the other ranks, which may be gone after an error."""
        self._abandoned.set()
        self._thread.shutdown()

    def start(self, state: TrainState, progress: Progress) -> None:
        """Begin a checkpoint, after waiting for the previous one; every rank must call this.

        Raises:
            OSError: If the previous one could not be written.
            DivergedError: If the previous one held a non-finite number.
        """
        self.finish()
        if self._ranks.is_rank_zero:
            remove_step(self._run_url, progress.step)
        self._ranks.barrier()
        runs = state.copy_own_slices(self._ranks)
        self._pending = self._thread.submit(self._write, runs, progress)

    def finish(self) -> None:
        """Wait until this rank's part of the pending checkpoint is written.

        On the first rank that is the complete checkpoint, with its marker.
        """
        self.raise_if_failed(wait=True)

    def raise_if_failed(self, *, wait: bool = False) -> None:
        """Raise the error of the writer thread, as soon as it is known."""
        if self._pending is not None and (wait or self._pending.done()):
            pending, self._pending = self._pending, None
            pending.result()

    def _write(self, runs: Mapping[str, Tensor], progress: Progress) -> None:
        check_weights(runs, progress.step, self._config)
        directory = step_directory(self._run_url, progress.step)
        write_part(directory, self._ranks.rank, runs)
        if not self._ranks.is_rank_zero:
            return
        while len(written_ranks(directory)) < self._ranks.world_size:
            if self._abandoned.wait(self._poll_s):
                return
        if self._fault:
            self._fault.trigger_at("train.checkpoint_written")
        write_marker(directory, progress, self._shapes, self._ranks.world_size, self._base_sha256)
        prune(self._run_url, self._config.num_checkpoints_kept, progress.step)
