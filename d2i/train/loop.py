"""The training loop: steps from the newest checkpoint to the last, every rank in the same pace."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from d2i import storage
from d2i.config import Recipe
from d2i.errors import ConfigError, DataError
from d2i.fault import Fault
from d2i.models import save_weights
from d2i.models.folder import build_network, resolve_sizes
from d2i.recipes import check_prepared_with
from d2i.runs import (
    EMA_NAME,
    MetricsLine,
    RunConfig,
    append_metrics,
    keep_metrics_until,
    open_run,
)
from d2i.shards import ShardReader
from d2i.train.batch import Batch, BatchReader
from d2i.train.checkpoint import (
    Progress,
    load_newest_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from d2i.train.ema import Ema
from d2i.train.engine import base_optimizer, build_engine, full_weights, join_ranks, master_weights
from d2i.train.objective import build_objective, is_joint
from d2i.train.order import DataOrder


@dataclass(frozen=True)
class TrainRequest:
    """One training job, the same on every rank."""

    recipe: Recipe
    data_url: str
    run_dir: Path
    fault: Fault | None = None


def train(request: TrainRequest) -> None:
    """Train to the recipe's last step, continuing where an earlier call was cut off.

    Raises:
        CheckpointError: If the run belongs to another recipe, other data or other ranks.
        ConfigError: If the ranks cannot share the global batch, or the sizes do not fit the data.
    """
    rank, world_size = join_ranks()
    with storage.only_writer(str(request.run_dir)) if rank == 0 else nullcontext():
        torch.distributed.barrier()
        _train_rank(request, rank, world_size)
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _train_rank(request: TrainRequest, rank: int, world_size: int) -> None:
    recipe, config = request.recipe, request.recipe.train
    reader = ShardReader(train_url(request.data_url))
    micro_batch_size, num_micro_batches = config.accumulation(world_size)
    check_prepared_with(recipe, reader.url)
    # Only a network without weights to start from draws its first ones here.
    torch.manual_seed(config.seed)
    network = build_network(recipe.backbone)
    check_sizes(network, reader)
    if rank == 0:
        finished = request.run_dir / EMA_NAME
        is_begun = finished.exists() or newest_checkpoint(request.run_dir) is not None
        open_run(request.run_dir, _run_config(request, reader, world_size), is_begun=is_begun)
    torch.distributed.barrier()
    engine = build_engine(network, config, micro_batch_size, num_micro_batches)
    ema = Ema(master_weights(engine), config.ema_rate)
    progress = load_newest_checkpoint(request.run_dir, engine, ema)
    if rank == 0:
        keep_metrics_until(request.run_dir, progress.step)
    _Stepper(request, engine, ema, reader, rank, world_size).run(progress)
    averaged = ema.read_in_place(lambda: full_weights(engine))
    if rank == 0:
        save_weights(averaged, request.run_dir / EMA_NAME)


def train_url(data_url: str) -> str:
    """Return the folder of the training shards: `DIR/train`, or `DIR` itself."""
    inner = storage.join(data_url, "train")
    return inner if storage.exists(storage.join(inner, "manifest.json")) else data_url


def check_sizes(network: Any, reader: ShardReader) -> None:
    """Make sure that the network takes what the shards hold.

    Raises:
        ConfigError: Naming the size that differs and the setting to change.
        DataError: If there is no sample.
    """
    arrays = reader.manifest.arrays
    if not len(reader):
        raise DataError(
            f"{reader.url} holds no sample; expected at least one; its ledger and manifest.json "
            "say why there is none"
        )
    if "text" not in arrays:
        raise ConfigError(
            f"{reader.url} holds no text latents; training needs them; prepare the data with "
            "--set text.latents=full"
        )
    latent, text = arrays["moments"].shape, arrays["text"].shape
    wanted = {
        "backbone.latent_size": (network.latent_size, latent[-1]),
        "backbone.num_text_tokens": (network.num_text_tokens, text[0]),
        "backbone.text_dim": (network.text_dim, text[1]),
    }
    for setting, (network_size, data_size) in wanted.items():
        if network_size != data_size:
            raise ConfigError(
                f"{setting} of the network is {network_size}, the shards hold {data_size}; "
                f"expected the same; --set {setting}={data_size} or prepare the data anew"
            )


class _Stepper:
    """Takes optimizer steps; owns the clock and the loss since the last line."""

    def __init__(
        self,
        request: TrainRequest,
        engine: Any,
        ema: Ema,
        reader: ShardReader,
        rank: int,
        world_size: int,
    ) -> None:
        self._request, self._config = request, request.recipe.train
        self._engine, self._ema = engine, ema
        self._rank, self._world_size = rank, world_size
        self._order = DataOrder(len(reader), self._config.seed)
        self._batches = BatchReader(
            reader, self._config, is_joint=is_joint(request.recipe.backbone)
        )
        self._objective = build_objective(
            request.recipe.backbone, engine.module.latent_scale, self._config.unidiffuser
        )
        self._losses: list[float] = []

    def run(self, progress: Progress) -> None:
        """Step from `progress` to the end, with lines and checkpoints on the way."""
        config, started = self._config, time.monotonic() - progress.elapsed_s
        self._losses = list(progress.losses)
        line_started, line_step = time.monotonic(), progress.step
        batches = self._read_ahead(progress.step)
        for step in range(progress.step, config.num_steps):
            self._step(step, batches)
            done = step + 1
            self._reach("train.step_done")
            if done % config.num_log_steps == 0 or done == config.num_steps:
                now = time.monotonic()
                rate = (done - line_step) * config.global_batch_size / (now - line_started)
                self._log(done, rate, now - started)
                line_started, line_step = now, done
            if done % config.num_checkpoint_steps == 0 or done == config.num_steps:
                state = Progress(done, time.monotonic() - started, tuple(self._losses))
                fault = self._request.fault
                save_checkpoint(self._request.run_dir, self._engine, self._ema, state, fault)
        self._batches.close()

    def _step(self, step: int, batches: Iterator[Batch]) -> None:
        self._set_learning_rate(step)
        _, num_micro_batches = self._config.accumulation(self._world_size)
        total = 0.0
        for _ in range(num_micro_batches):
            batch = next(batches).to(self._engine.device)
            loss = self._objective(self._engine, batch)
            self._engine.backward(loss)
            self._engine.step()
            total += loss.item()
        self._ema.update()
        self._losses.append(total / num_micro_batches)

    def _read_ahead(self, first_step: int) -> Iterator[Batch]:
        waiting: Future[Batch] | None = None
        for requested in self._requests(first_step):
            if waiting is not None:
                yield waiting.result()
            waiting = requested
        if waiting is not None:
            yield waiting.result()

    def _requests(self, first_step: int) -> Iterator[Future[Batch]]:
        config = self._config
        _, num_micro_batches = config.accumulation(self._world_size)
        for step in range(first_step, config.num_steps):
            for indices in self._order.micro_batches(
                step, config.global_batch_size, self._rank, self._world_size, num_micro_batches
            ):
                yield self._batches.request(indices, step)

    def _set_learning_rate(self, step: int) -> None:
        """Linear warm-up from 0, then constant (models.md, section 2.5)."""
        optim = self._config.optim
        warmed = min(1.0, step / optim.num_warmup_steps) if optim.num_warmup_steps else 1.0
        for group in base_optimizer(self._engine).param_groups:
            group["lr"] = optim.lr * warmed

    def _log(self, step: int, images_per_s: float, elapsed_s: float) -> None:
        loss = torch.tensor(sum(self._losses) / len(self._losses), device=self._engine.device)
        self._losses = []
        torch.distributed.all_reduce(loss)
        if self._rank != 0:
            return
        line = MetricsLine(
            step=step,
            loss=loss.item() / self._world_size,
            lr=base_optimizer(self._engine).param_groups[0]["lr"],
            num_images=step * self._config.global_batch_size,
            images_per_s=round(images_per_s, 2),
            elapsed_s=round(elapsed_s, 2),
        )
        append_metrics(self._request.run_dir, line)
        _print_progress(line, self._config.num_steps, self._config.global_batch_size)

    def _reach(self, point: str) -> None:
        if self._request.fault:
            self._request.fault.reach(point)


def _print_progress(line: MetricsLine, num_steps: int, global_batch_size: int) -> None:
    left_s = (num_steps - line.step) * global_batch_size / max(line.images_per_s, 1e-9)
    sys.stderr.write(
        f"step {line.step}/{num_steps}  loss {line.loss:.4f}  "
        f"{line.images_per_s:.0f} images/s  {left_s:.0f} s left\n"
    )
    sys.stderr.flush()


def _run_config(request: TrainRequest, reader: ShardReader, world_size: int) -> RunConfig:
    # The run says every size of its network, wherever its first weights lie.
    backbone = resolve_sizes(request.recipe.backbone).model_dump(mode="json")
    return RunConfig(
        recipe=request.recipe.model_dump(mode="json") | {"backbone": backbone},
        data=storage.resolve(request.data_url),
        manifest_sha256=reader.manifest.sha256,
        world_size=world_size,
    )
