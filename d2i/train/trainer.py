"""The training loop: read this first. Whatever is due after a step is a hook that it is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from d2i.config import OptimConfig, TrainConfig
from d2i.fault_injection import Fault
from d2i.train.checkpoint.checkpoint_writer import TrainState
from d2i.train.data.loader import BatchStream
from d2i.train.distributed.engine import base_optimizer
from d2i.train.distributed.ranks import Ranks
from d2i.train.monitor.loss_tracker import LossTracker
from d2i.train.monitor.throughput import Throughput
from d2i.train.objective import Objective
from d2i.train.stop_signal import StopSignal


class Hook:
    """Something due after some steps, such as a checkpoint; every rank calls every hook."""

    def after_step(self, step: int, *, is_last: bool) -> None:
        """Do what is due after a step; `is_last` if the loop ends with it, also if stopped."""

    def end(self, step: int) -> None:
        """Do what is due once the loop has ended with a step; by default nothing."""


@dataclass(frozen=True)
class Trainer:
    """Runs optimizer steps on one rank, in step with the others.

    Args:
        config: The settings of training.
        ranks: All ranks.
        state: The DeepSpeed engine and the averages of its weights.
        batches: The micro batches of this rank.
        objective: The loss of each sample; a step minimizes its mean.
        losses: Takes the loss of each micro batch.
        pace: Measures speed and time waiting for data.
        hooks: Called in this order after each step.
        fault: A fault to inject, for tests.
    """

    config: TrainConfig
    ranks: Ranks
    state: TrainState
    batches: BatchStream
    objective: Objective
    losses: LossTracker
    pace: Throughput
    hooks: Sequence[Hook]
    fault: Fault | None = None

    def training_loop(self, step: int) -> int:
        """Train from `step` to the last step or a stop request; return the steps made."""
        stop = StopSignal(self.ranks)
        self.batches.begin(step)
        is_last = step == self.config.num_steps
        while not is_last:
            self._step(step)
            step += 1
            if self.fault:
                self.fault.trigger_at("train.step_done")
            is_last = step == self.config.num_steps or stop.is_agreed()
            for hook in self.hooks:
                hook.after_step(step, is_last=is_last)
        stop.close()
        self.batches.close()
        for hook in self.hooks:
            hook.end(step)
        return step

    def _step(self, step: int) -> None:
        """Make one optimizer step of `global_batch_size` samples, and update the averages."""
        engine = self.state.engine
        for group in base_optimizer(engine).param_groups:
            group["lr"] = learning_rate(self.config.optim, step)
        self.batches.prefetch_shards(step)
        for _ in range(self.batches.num_micro_batches):
            with self.pace.waiting_for_data():
                batch = next(self.batches)
            loss = self.objective(engine, batch.to(self.ranks.device)).mean()
            engine.backward(loss)
            # Updates the weights after the last micro batch of a step.
            engine.step()
            self.losses.add(loss)
        self.state.update_averages()


def learning_rate(optim: OptimConfig, step: int) -> float:
    """Return a step's rate: linear warm-up from 0, then constant (`utils.py:54-61` of U-ViT)."""
    warmed = min(1.0, step / optim.num_warmup_steps) if optim.num_warmup_steps else 1.0
    return optim.lr * warmed
