"""Training on one rank, in step with the others: resume, train to the last step, save weights."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from d2i.backbones import presets_of, sampler_problem
from d2i.config import Recipe
from d2i.errors import CheckpointError, ConfigError
from d2i.fault_injection import Fault
from d2i.io import storage
from d2i.io.progress_bar import ProgressBar
from d2i.io.terminal import is_terminal
from d2i.models.model_dir import resolve_sizes
from d2i.models.pipeline_dir import PipelineDirectory
from d2i.models.registry import family_of_backbone
from d2i.models.weights.initial import base_sha256, describe_initial_weights
from d2i.recipes import check_prepared_with
from d2i.run_dir import (
    STOPPED_NAME,
    RunConfig,
    keep_num_steps,
    last_step,
    result_names,
    start_or_resume,
)
from d2i.shards import ShardReader, data_set_url
from d2i.train.checkpoint.checkpoint_files import (
    Checkpoint,
    Progress,
    latest_valid_checkpoint,
    step_directory,
)
from d2i.train.checkpoint.checkpoint_writer import CheckpointWriter, TrainState, build_state
from d2i.train.data.base_parts import check_base_parts
from d2i.train.data.batch import BatchLoader
from d2i.train.data.loader import BatchStream, check_arrays, check_cache, check_sizes
from d2i.train.data.text_source import OpenText, build_text, prepare_text
from d2i.train.distributed.engine import build_engine, join_ranks, trained_parameters
from d2i.train.distributed.ranks import Ranks
from d2i.train.failures import reported_errors, resume_hint
from d2i.train.hooks import (
    CheckpointHook,
    Logs,
    MetricsHook,
    ProgressHook,
    SampleHook,
    ValidationHook,
)
from d2i.train.model_card import write_model_card
from d2i.train.monitor.loss_tracker import LossTracker
from d2i.train.monitor.metrics_logger import MetricsLogger, kept_lines, say
from d2i.train.monitor.sample_grid import SampleGrid
from d2i.train.monitor.throughput import Throughput, peak_images_per_s
from d2i.train.monitor.validation import Validation
from d2i.train.network import build_trained_network, load_trained
from d2i.train.objective import build_objective
from d2i.train.request import TrainRequest
from d2i.train.results import save_network_config, save_trained
from d2i.train.trainer import Hook, Trainer


def train(request: TrainRequest, fault: Fault | None = None) -> None:
    """Train to the recipe's last step, resuming where an earlier call was interrupted.

    Args:
        request: The job.
        fault: A fault to inject, for tests.

    Raises:
        CheckpointError: If the run belongs to another recipe or other data, has already made more
            steps, or cannot resume because its checkpoints are gone.
        ConfigError: If the ranks cannot share the global batch, or the sizes do not fit the data.
        D2IError: For other errors that the user can fix.
    """
    ranks = join_ranks()
    with reported_errors(request, ranks), ExitStack() as stack:
        _hold_run(request.run_url, ranks, stack)
        _train_rank(request, ranks, fault)
        ranks.barrier()
    torch.distributed.destroy_process_group()


def _hold_run(run_url: str, ranks: Ranks, stack: ExitStack) -> None:
    """Lock the run directory exclusively, on the first rank, until the stack is left."""

    def hold() -> int:
        stack.enter_context(storage.exclusive_lock(run_url))
        return 0

    ranks.run_on_rank_zero(hold)


def _train_rank(request: TrainRequest, ranks: Ranks, fault: Fault | None) -> None:
    recipe, config, run_url = request.recipe, request.recipe.train, request.run_url
    config.accumulation(ranks.world_size)
    _check_sampling(recipe)
    reader = request.open_shards(data_set_url(request.data_url, "train"))
    check_cache(reader, request.open_validation(), config, request.cache_gb)
    check_prepared_with(recipe, reader.url)
    check_arrays(recipe, reader)
    # Seeds the random initial weights of a network that loads none.
    torch.manual_seed(config.seed)
    network = build_trained_network(recipe)
    if ranks.is_rank_zero:
        _say_licence(recipe)
    ranks.build_on_rank_zero(lambda: check_base_parts(recipe, reader))
    open_text = build_text(recipe, reader, str(ranks.device))
    check_sizes(network, reader, open_text(reader))
    checkpoint = _find_checkpoint(run_url, ranks)
    base = ranks.build_on_rank_zero(lambda: _check_base(recipe, checkpoint))
    if ranks.run_on_rank_zero(lambda: _open_run(request, reader, ranks, checkpoint)):
        return
    prepare_text(open_text, filter(None, (reader, request.open_validation())))
    # Before the engine is built: ZeRO 3 leaves an empty tensor in place of each parameter.
    shapes = {name: tuple(trained.shape) for name, trained in trained_parameters(network)}
    state = _build_state(request, ranks, network, checkpoint)
    progress = checkpoint.progress if checkpoint else Progress()
    with CheckpointWriter(run_url, config, ranks, shapes, fault, base) as writer:
        step = run_loop(request, ranks, state, reader, open_text, writer, progress, fault)
        writer.finish()
        ranks.barrier()
    if ranks.is_rank_zero:
        _end(request, step)


def run_loop(
    request: TrainRequest,
    ranks: Ranks,
    state: TrainState,
    reader: ShardReader,
    open_text: OpenText,
    writer: CheckpointWriter,
    progress: Progress,
    fault: Fault | None,
) -> int:
    """Build the loop and the hooks it is given, and train; return the steps made."""
    recipe, config, run_url = request.recipe, request.recipe.train, request.run_url
    family = family_of_backbone(recipe.backbone.name)
    open_batches = partial(BatchLoader, config=config, family=family, open_text=open_text)
    objective = build_objective(family, family.vae_numbers(state.engine.module), config)
    batches = BatchStream(reader, open_batches(reader), config, ranks, run_url)
    valid = request.open_validation()
    validation = valid and Validation(
        open_batches(valid), len(valid), config, family, objective, ranks
    )
    grid = None
    if valid and config.num_sample_steps:
        grid = ranks.build_on_rank_zero(
            lambda: SampleGrid(recipe, valid, ranks.device, open_text(valid))
        )
    peak = None
    if ranks.is_rank_zero:
        peak = peak_images_per_s(recipe.backbone, config.precision, ranks.device, ranks.world_size)
    kept = kept_lines(progress, config)
    logs = Logs(ranks, ranks.build_on_rank_zero(lambda: MetricsLogger(run_url, recipe, *kept)))
    losses = LossTracker(ranks, batches, config, progress.losses)
    pace = Throughput(progress.step, progress.elapsed_s)
    hooks: list[Hook] = [MetricsHook(config, logs, losses, pace, peak)]
    if validation:
        hooks.append(ValidationHook(config, logs, validation, state))
    hooks.append(CheckpointHook(config, writer, state, losses, pace))
    if config.num_sample_steps:
        hooks.append(SampleHook(config.num_sample_steps, run_url, writer, grid))
    with closing(ProgressBar()) as bar:
        if ranks.is_rank_zero and is_terminal(sys.stderr):
            # Elsewhere the metrics lines are the progress.
            hooks.append(ProgressHook(config, bar, progress.step))
        trainer = Trainer(config, ranks, state, batches, objective, losses, pace, hooks, fault)
        step = trainer.training_loop(progress.step)
    if logs.logger:
        logs.logger.close()
    return step


def _say_licence(recipe: Recipe) -> None:
    """Print the licence of the base model, which holds for what is trained, too."""
    presets, weights = presets_of(recipe.backbone.name), recipe.backbone.weights
    if presets.pipeline and weights:
        say(f"{recipe.backbone.name}: {PipelineDirectory(weights, presets).describe_licence()}")


def _find_checkpoint(run_url: str, ranks: Ranks) -> Checkpoint | None:
    """Find the checkpoint to resume from; the first rank verifies every byte for all ranks."""

    def newest_step() -> int:
        found = latest_valid_checkpoint(run_url, lambda line: say(f"warning: {line}"))
        return found.progress.step if found else 0

    step = ranks.run_on_rank_zero(newest_step)
    return Checkpoint(step_directory(run_url, step)) if step else None


def _check_base(recipe: Recipe, checkpoint: Checkpoint | None) -> str | None:
    """Return the sha256 of the base model's network, or None for a network that has no base.

    Raises:
        CheckpointError: If the checkpoint was made on another base.
    """
    found = base_sha256(recipe.backbone)
    expected = checkpoint.base_sha256 if checkpoint else found
    if found != expected:
        raise CheckpointError(
            f"backbone.weights {recipe.backbone.weights}: its network has sha256 "
            f"{str(found)[:16]}…; expected {str(expected)[:16]}…, on which this run began; restore "
            "that base model, or start another --run"
        )
    return found


def _open_run(
    request: TrainRequest, reader: ShardReader, ranks: Ranks, checkpoint: Checkpoint | None
) -> int:
    """Start or resume the run; return 1 if it is finished and its checkpoints are gone, else 0."""
    run_url = request.run_url
    finished_at = last_step(run_url, request.recipe)
    made = max(finished_at or 0, checkpoint.progress.step if checkpoint else 0)
    storage.remove(storage.join(run_url, STOPPED_NAME))
    config = _run_config(request, reader, ranks.world_size)
    if not made:
        # Only a new run reads its initial weights; a resumed one keeps the entry from its start.
        config = replace(config, initial_weights=describe_initial_weights(request.recipe.backbone))
    start_or_resume(run_url, config, is_begun=made > 0)
    _check_num_steps(request, made, can_go_on=checkpoint is not None or not made)
    if checkpoint is None and made:
        say(f"{run_url} is finished and its checkpoints are gone: nothing to do")
        return 1
    return 0


def _check_num_steps(request: TrainRequest, made: int, *, can_go_on: bool) -> None:
    """Check that a run that has made some steps can end at `train.num_steps`.

    No step depends on the number of steps to come (the learning rate is constant after its
    warm-up), so a run may be trained longer.

    Raises:
        CheckpointError: If it has already made more steps, or cannot resume.
    """
    run_url, num_steps = request.run_url, request.recipe.train.num_steps
    if num_steps < made:
        raise CheckpointError(
            f"train.num_steps is {num_steps}, but {run_url} has already made {made} steps; "
            f"expected at least {made}; use --set train.num_steps={made} or more, or another --run"
        )
    if num_steps > made and not can_go_on:
        raise CheckpointError(
            f"{run_url} was finished at step {made} and its checkpoints are gone, so it cannot "
            f"continue to step {num_steps}; restore a checkpoint, or start another --run from "
            "these weights with --set backbone.weights=PATH"
        )


def _check_sampling(recipe: Recipe) -> None:
    """Check that images can be generated from the run, by its sampler and kind of weights.

    Raises:
        ConfigError: If the backbone has no such sampler, or the run does not keep that EMA.
    """
    if problem := sampler_problem(recipe.backbone.name, recipe.sample.sampler):
        raise ConfigError(problem)
    if recipe.sample.weights == "ema-short" and recipe.train.short_ema_length is None:
        raise ConfigError(
            "sample.weights is ema-short, but train.short_ema_length is null, so the run keeps no "
            "short EMA; expected a length such as 0.05; use --set train.short_ema_length=0.05"
        )


def _build_state(
    request: TrainRequest, ranks: Ranks, network: Any, checkpoint: Checkpoint | None
) -> TrainState:
    config = request.recipe.train
    if checkpoint:
        # Before the engine is built, so that every copy that ZeRO makes of the weights is right.
        load_trained(network, dict(checkpoint.read_whole("weight")))
    engine = build_engine(network, config, ranks.world_size, request.zero)
    state = build_state(engine, config)
    if checkpoint:
        state.restore(checkpoint)
    return state


def _end(request: TrainRequest, step: int) -> None:
    run_url, config = request.run_url, request.recipe.train
    if step < config.num_steps:
        stopped = json.dumps({"step": step}) + "\n"
        storage.write_bytes(storage.join(run_url, STOPPED_NAME), stopped.encode())
        say(f"stopped at step {step}/{config.num_steps}: {resume_hint(run_url)}")
        return
    checkpoint = Checkpoint(step_directory(run_url, step))
    for kind, name in reversed(result_names(request.recipe).items()):
        if kind != "ema-short" or config.short_ema_length is not None:
            url = storage.join(run_url, name)
            save_network_config(request.recipe, url)
            save_trained(request.recipe, checkpoint, kind, url)
    if checkpoint.base_sha256:
        backbone, data_url = request.recipe.backbone, data_set_url(request.data_url, "train")
        base = PipelineDirectory(backbone.weights or "", presets_of(backbone.name))
        write_model_card(run_url, request.recipe, base, data_url, checkpoint.base_sha256)
    keep_num_steps(run_url, step)


def _run_config(request: TrainRequest, reader: ShardReader, world_size: int) -> RunConfig:
    # Records every size of the network, including those from the files of its initial weights.
    backbone = resolve_sizes(request.recipe.backbone).model_dump(mode="json")
    return RunConfig(
        recipe=request.recipe.model_dump(mode="json") | {"backbone": backbone},
        data=storage.resolve(request.data_url),
        manifest_sha256=reader.manifest.sha256,
        world_size=world_size,
    )
