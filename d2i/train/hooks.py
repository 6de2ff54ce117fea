"""Hooks of the training loop: metrics, validation, checkpoints, sample images and the bar."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from d2i.config import TrainConfig
from d2i.io import storage
from d2i.io.progress_bar import Counts, ProgressBar
from d2i.run_dir import MetricsLine
from d2i.train.checkpoint.checkpoint_files import Checkpoint, Progress, step_directory
from d2i.train.checkpoint.checkpoint_writer import CheckpointWriter, TrainState
from d2i.train.distributed.engine import loss_scaler_state
from d2i.train.distributed.ranks import Ranks
from d2i.train.monitor.loss_tracker import LossTracker
from d2i.train.monitor.metrics_logger import MetricsLogger, say
from d2i.train.monitor.sample_grid import SampleGrid
from d2i.train.monitor.throughput import Throughput, progress_line
from d2i.train.monitor.validation import Validation
from d2i.train.trainer import Hook, learning_rate


@dataclass(frozen=True)
class Logs:
    """The logs of a run, which the first rank alone writes.

    Args:
        ranks: All ranks.
        logger: The logs, on the first rank; else None.
    """

    ranks: Ranks
    logger: MetricsLogger | None

    def is_missing(self, has_line: Callable[[MetricsLogger, int], bool], step: int) -> bool:
        """Return whether the logs have no such line for a step; every rank must call this."""
        logger = self.logger
        return bool(
            self.ranks.run_on_rank_zero(lambda: logger is not None and not has_line(logger, step))
        )


@dataclass(frozen=True)
class MetricsHook(Hook):
    """Logs and prints a metrics line every `num_log_steps`.

    Args:
        config: The settings of training.
        logs: The logs.
        losses: The losses since the last line.
        pace: The speed since the last line.
        peak_images_per_s: Images per second of all devices at their peak; None if unknown.
    """

    config: TrainConfig
    logs: Logs
    losses: LossTracker
    pace: Throughput
    peak_images_per_s: float | None

    def after_step(self, step: int, *, is_last: bool) -> None:
        """Log a line if one is due."""
        del is_last
        if step % self.config.num_log_steps == 0:
            self._log(step)

    def end(self, step: int) -> None:
        """Log the line of the run's last step, if it is missing."""
        is_end = step == self.config.num_steps and bool(self.losses.known)
        if is_end and self.logs.is_missing(MetricsLogger.has_metrics, step):
            self._log(step)

    def _log(self, step: int) -> None:
        losses = self.losses.take(step)
        steps_per_s, waited = self.pace.next_line(step)
        if self.logs.logger is None:
            return
        size, peak = self.config.global_batch_size, self.peak_images_per_s
        images_per_s = steps_per_s * size
        line = MetricsLine(
            step=step,
            loss=sum(losses) / len(losses),
            lr=learning_rate(self.config.optim, step - 1),
            num_images=step * size,
            images_per_s=round(images_per_s, 2),
            elapsed_s=round(self.pace.elapsed_s, 2),
            data_wait=round(waited, 4),
            mfu=round(images_per_s / peak, 4) if peak else None,
        )
        self.logs.logger.metrics(line)
        say(progress_line(line, self.config.num_steps, size))


@dataclass(frozen=True)
class ValidationHook(Hook):
    """Logs and prints the validation loss every `num_validation_steps`.

    Args:
        config: The settings of training.
        logs: The logs.
        validation: The loss on fixed samples.
        state: The engine whose weights it is computed with.
    """

    config: TrainConfig
    logs: Logs
    validation: Validation
    state: TrainState

    def after_step(self, step: int, *, is_last: bool) -> None:
        """Log a loss if one is due."""
        del is_last
        if step % self.config.num_validation_steps == 0:
            self._validate(step)

    def end(self, step: int) -> None:
        """Log the loss of the run's last step, if it is missing."""
        is_end = step == self.config.num_steps
        if is_end and self.logs.is_missing(MetricsLogger.has_validation, step):
            self._validate(step)

    def _validate(self, step: int) -> None:
        line = self.validation.loss(self.state.engine, step)
        if self.logs.logger:
            self.logs.logger.validation(line)


@dataclass(frozen=True)
class CheckpointHook(Hook):
    """Begins a checkpoint every `num_checkpoint_steps` and after the last step.

    Args:
        config: The settings of training.
        writer: Writes the checkpoint while training goes on.
        state: What it holds.
        losses: The losses since the last metrics line, which it holds too.
        pace: The time of training, which it holds too.
    """

    config: TrainConfig
    writer: CheckpointWriter
    state: TrainState
    losses: LossTracker
    pace: Throughput

    def after_step(self, step: int, *, is_last: bool) -> None:
        """Begin a checkpoint if one is due; raise the error of the last one once it is known."""
        if step % self.config.num_checkpoint_steps == 0 or is_last:
            self.losses.collect(step)
            progress = Progress(
                step=step,
                elapsed_s=self.pace.elapsed_s,
                losses=tuple(self.losses.known),
                num_updates=self.state.num_updates(),
                loss_scale=loss_scaler_state(self.state.engine),
            )
            self.writer.start(self.state, progress)
        self.writer.raise_if_failed()


@dataclass(frozen=True)
class SampleHook(Hook):
    """Generates sample images every `num_sample_steps`, from the checkpoint of that step.

    Args:
        num_sample_steps: Steps from one to the next.
        run_url: The run directory.
        writer: Writes the checkpoint.
        grid: Generates them, on the first rank; the others wait at their next step.
    """

    num_sample_steps: int
    run_url: str
    writer: CheckpointWriter
    grid: SampleGrid | None

    def after_step(self, step: int, *, is_last: bool) -> None:
        """Generate images if they are due."""
        del is_last
        if step % self.num_sample_steps:
            return
        self.writer.finish()
        if self.grid:
            checkpoint = Checkpoint(step_directory(self.run_url, step))
            image = storage.join(self.run_url, "samples", f"step-{step}.png")
            self.grid.generate(checkpoint, image)


@dataclass(frozen=True)
class ProgressHook(Hook):
    """Shows the steps made on a progress bar; on the first rank alone.

    Args:
        config: The settings of training.
        bar: The bar.
        num_before: Steps that the run had made before.
        started: When this command began to train, on the monotonic clock.
    """

    config: TrainConfig
    bar: ProgressBar
    num_before: int
    started: float = field(default_factory=time.monotonic)

    def after_step(self, step: int, *, is_last: bool) -> None:
        """Show the step."""
        del is_last
        num_steps = self.config.num_steps
        self.bar.show(
            Counts(
                line=f"step {step}/{num_steps}",
                done=step,
                total=num_steps,
                unit="steps",
                started=self.started,
                num_before=self.num_before,
            )
        )
