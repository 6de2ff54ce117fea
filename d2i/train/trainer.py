"""Optimizer steps, and the logging, validation, checkpoints and sample images due after them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from d2i.fault_injection import Fault
from d2i.io import storage
from d2i.run_dir import MetricsLine
from d2i.shards import ShardReader
from d2i.train.checkpoint.checkpoint_files import Checkpoint, Progress, step_directory
from d2i.train.checkpoint.checkpoint_writer import CheckpointWriter, TrainState
from d2i.train.data.batch import Batch, BatchLoader
from d2i.train.data.loader import build_order, build_text_encoder
from d2i.train.distributed.engine import base_optimizer, loss_scaler_state
from d2i.train.distributed.ranks import Ranks
from d2i.train.failures import check_finite
from d2i.train.monitor.metrics_logger import LossTracker, MetricsLogger, record_keys, say
from d2i.train.monitor.sample_grid import SampleGrid
from d2i.train.monitor.throughput import Throughput, count_flops, peak_flops, progress_line
from d2i.train.monitor.validation import Validation
from d2i.train.objective import Objective, build_objective
from d2i.train.request import TrainRequest
from d2i.train.stop_signal import StopSignal


class Trainer:
    """Runs optimizer steps; owns the clock and the losses since the last metrics line."""

    def __init__(
        self,
        request: TrainRequest,
        ranks: Ranks,
        state: TrainState,
        reader: ShardReader,
        writer: CheckpointWriter,
        fault: Fault | None = None,
    ) -> None:
        self._request, self._config = request, request.recipe.train
        self._fault = fault
        self._ranks, self._state, self._writer = ranks, state, writer
        self._engine = state.engine
        self._order = build_order(reader, self._config)
        self._reader = reader
        encoders = request.recipe.encoders
        self._encode_text = build_text_encoder(reader, encoders, str(ranks.device))
        self._batches = self._batches_of(reader)
        backbone = request.recipe.backbone
        self._objective: Objective = build_objective(
            backbone, self._engine.module.latent_scale, self._config.unidiffuser
        )
        _, self._num_micro_batches = self._config.accumulation(ranks.world_size)
        self._losses = LossTracker(ranks, self._num_micro_batches)
        self._flops_per_s = self._peak_images_per_s()
        self._validation, self._grid = self._watchers()

    def training_loop(self, progress: Progress) -> Progress:
        """Train from `progress` to the last step or a stop request; return the progress made."""
        config = self._config
        self._pace = Throughput(progress.step, progress.elapsed_s)
        self._losses.known = list(progress.losses)
        run_url, recipe = self._request.run_url, self._request.recipe
        kept = self._kept_lines(progress)
        self._records = self._ranks.build_on_rank_zero(
            lambda: MetricsLogger(run_url, recipe, *kept)
        )
        stop = StopSignal(self._ranks)
        batches = self._batches.read_ahead(self._requests(progress.step))
        step = progress.step
        while step < config.num_steps:
            self._step(step, batches)
            step += 1
            if self._fault:
                self._fault.trigger_at("train.step_done")
            is_last = step == config.num_steps or stop.is_agreed()
            self._after_step(step, is_last=is_last)
            if is_last:
                break
        stop.close()
        self._batches.close()
        if step == config.num_steps:
            self._write_last_lines(step)
        if self._records:
            self._records.close()
        return Progress(step=step, elapsed_s=self._pace.elapsed_s)

    def _after_step(self, step: int, *, is_last: bool) -> None:
        config = self._config
        if step % config.num_log_steps == 0:
            self._log(step)
        if step % config.num_validation_steps == 0:
            self._validate(step)
        if step % config.num_checkpoint_steps == 0 or is_last:
            self._save(step)
        if config.num_sample_steps and step % config.num_sample_steps == 0:
            self._generate_samples(step)
        self._writer.raise_if_failed()

    def _kept_lines(self, progress: Progress) -> tuple[int, int]:
        """Return the last steps whose metrics and validation lines are kept.

        A run that resumes past its former end drops the lines that it wrote only because it ended:
        a run planned that long from the start would not have them.
        """
        step = progress.step
        if step == self._config.num_steps:
            return step, step
        is_due = step % self._config.num_validation_steps == 0
        return step - len(progress.losses), step if is_due else step - 1

    def _write_last_lines(self, step: int) -> None:
        """Write the last step's metrics and validation lines if they do not exist yet."""
        if self._losses.known and self._is_missing(MetricsLogger.has_metrics, step):
            self._log(step)
        if self._validation and self._is_missing(MetricsLogger.has_validation, step):
            self._validate(step)

    def _is_missing(self, has_line: Callable[[MetricsLogger, int], bool], step: int) -> bool:
        """Return whether the first rank, which writes the logs, has no such line for a step."""
        records = self._records
        return bool(
            self._ranks.run_on_rank_zero(
                lambda: records is not None and not has_line(records, step)
            )
        )

    def _validate(self, step: int) -> None:
        if self._validation is None:
            return
        line = self._validation.loss(self._engine, step)
        if self._records:
            self._records.validation(line)

    def _step(self, step: int, batches: Iterator[Batch]) -> None:
        for group in base_optimizer(self._engine).param_groups:
            group["lr"] = self._learning_rate(step)
        # Counts from the first unread batch: shards of batches read ahead may be evicted already.
        unread = self._batches.first_unread(step)
        self._reader.prefetch(self._order.shards_ahead(unread, self._config.global_batch_size))
        for _ in range(self._num_micro_batches):
            with self._pace.waiting_for_data():
                batch = next(batches)
            if self._config.record_keys:
                record_keys(self._request.run_url, self._ranks.rank, step + 1, batch.keys)
            loss = self._objective(self._engine, batch.to(self._ranks.device)).mean()
            self._engine.backward(loss)
            self._engine.step()
            self._losses.add(loss)
        self._state.update_averages()

    def _requests(self, first_step: int) -> Iterator[tuple[NDArray[np.int64], int]]:
        for step in range(first_step, self._config.num_steps):
            for indices in self._micro_batches(step, self._ranks.rank):
                yield indices, step

    def _micro_batches(self, step: int, rank: int) -> list[NDArray[np.int64]]:
        size, world_size = self._config.global_batch_size, self._ranks.world_size
        return self._order.micro_batches(step, size, rank, world_size, self._num_micro_batches)

    def _learning_rate(self, step: int) -> float:
        """Linear warm-up from 0, then constant (`utils.py:54-61` of U-ViT)."""
        optim = self._config.optim
        warmed = min(1.0, step / optim.num_warmup_steps) if optim.num_warmup_steps else 1.0
        return optim.lr * warmed

    def _collect_losses(self, step: int) -> None:
        """Gather the losses up to a step from all ranks, and check that they are finite."""
        losses, bad = self._losses.collect()
        first = step - len(losses) + 1
        keys: dict[int, list[str]] = {}
        for number, rank, micro_batch in bad:
            indices = self._micro_batches(first + number - 1, rank)[micro_batch]
            keys.setdefault(first + number, []).extend(self._reader.keys[int(i)] for i in indices)
        check_finite(losses, first, keys, self._config)

    def _save(self, step: int) -> None:
        self._collect_losses(step)
        progress = Progress(
            step=step,
            elapsed_s=self._pace.elapsed_s,
            losses=tuple(self._losses.known),
            num_updates=self._state.num_updates(),
            loss_scale=loss_scaler_state(self._engine),
        )
        self._writer.start(self._state, progress)

    def _log(self, step: int) -> None:
        self._collect_losses(step)
        losses, self._losses.known = self._losses.known, []
        steps_per_s, waited = self._pace.next_line(step)
        images_per_s = steps_per_s * self._config.global_batch_size
        if self._records is None:
            return
        line = MetricsLine(
            step=step,
            loss=sum(losses) / len(losses),
            lr=self._learning_rate(step - 1),
            num_images=step * self._config.global_batch_size,
            images_per_s=round(images_per_s, 2),
            elapsed_s=round(self._pace.elapsed_s, 2),
            data_wait=round(waited, 4),
            mfu=round(images_per_s / self._flops_per_s, 4) if self._flops_per_s else None,
        )
        self._records.metrics(line)
        say(progress_line(line, self._config.num_steps, self._config.global_batch_size))

    def _peak_images_per_s(self) -> float | None:
        """Return the images/s of all devices at their peak, on the first rank; None if unknown."""
        peak = peak_flops(self._ranks.device, self._config.precision)
        if peak is None or not self._ranks.is_rank_zero:
            return None
        return self._ranks.world_size * peak / count_flops(self._request.recipe.backbone)

    def _batches_of(self, reader: ShardReader) -> BatchLoader:
        joint = self._request.recipe.backbone.is_joint
        return BatchLoader(reader, self._config, is_joint=joint, encode_text=self._encode_text)

    def _watchers(self) -> tuple[Validation | None, SampleGrid | None]:
        """Build the validation loss and the sample grid, if there is a validation split."""
        reader = self._request.open_validation()
        if reader is None:
            return None, None
        validation = Validation(
            self._batches_of(reader), len(reader), self._config, self._objective, self._ranks
        )
        return validation, self._build_grid(reader)

    def _build_grid(self, reader: ShardReader) -> SampleGrid | None:
        """Build the sample grid on the first rank, if sample images are enabled."""
        if not self._config.num_sample_steps:
            return None
        recipe, device = self._request.recipe, self._ranks.device
        return self._ranks.build_on_rank_zero(
            lambda: SampleGrid(recipe, reader, device, self._encode_text)
        )

    def _generate_samples(self, step: int) -> None:
        """Generate sample images on the first rank; the others wait at their next step."""
        self._writer.finish()
        if self._grid:
            checkpoint = Checkpoint(step_directory(self._request.run_url, step))
            image = storage.join(self._request.run_url, "samples", f"step-{step}.png")
            self._grid.generate(checkpoint, image)
