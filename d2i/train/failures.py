"""Errors that end a training: one line with what, where and what to do, reported by one rank."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from d2i.config import TrainConfig
from d2i.errors import ClusterError, D2IError
from d2i.io import storage
from d2i.train.checkpoint.checkpoint_files import complete_checkpoints
from d2i.train.distributed.ranks import AlreadyReportedError, Ranks
from d2i.train.request import TrainRequest

_SIGNS_OF_THE_OTHERS = ("connection", "peer", "gloo", "nccl", "socket")


@contextmanager
def reported_errors(request: TrainRequest, ranks: Ranks) -> Iterator[None]:
    """Turn an exception that ends this rank into an error for the user; every rank must call this.

    Raises:
        D2IError: As `first_error` returns it.
    """
    hosts = ranks.hosts()
    try:
        yield
    except Exception as err:
        meaning = first_error(err, request, ranks, hosts)
        if meaning is None or meaning is err:
            raise
        raise meaning from err


def first_error(
    error: Exception, request: TrainRequest, ranks: Ranks, hosts: Sequence[str]
) -> D2IError | None:
    """Return the error for the user in place of an exception that ends this rank.

    Args:
        error: The exception.
        request: The training job.
        ranks: This rank and its process group.
        hosts: The host of each rank.

    Returns:
        An `AlreadyReportedError` if another rank reports the reason; None for a bug, which is to
        be raised unchanged.
    """
    if isinstance(error, RankError | AlreadyReportedError):
        return error
    if isinstance(error, D2IError):
        return _own_or_common_error(error, ranks, hosts)
    meaning = explain_error(error, request.run_url, request.recipe.train)
    if meaning is not None:
        return meaning if ranks.claim_report() is not False else AlreadyReportedError()
    if ranks.world_size > 1 and _is_peer_failure(error):
        return _peer_failure(request.run_url, ranks, hosts)
    return None


def report_error(error: D2IError) -> str | None:
    """Return the error line for this rank to print, or None if another rank prints it.

    An error from before the ranks joined is the same on all of them, so rank 0 prints it.
    """
    if isinstance(error, AlreadyReportedError):
        return None
    is_mine = os.environ.get("RANK", "0") == "0" or isinstance(error, RankError)
    return str(error) if is_mine else None


def _own_or_common_error(error: D2IError, ranks: Ranks, hosts: Sequence[str]) -> D2IError:
    """Have the first rank report an error that all ranks have, and this rank one of its own."""
    if ranks.is_rank_zero:
        return error if ranks.claim_report() is not False else AlreadyReportedError()
    if ranks.is_reported() is False and ranks.claim_report():
        return RankError(f"rank {ranks.rank} on {hosts[ranks.rank]}: {error}")
    return AlreadyReportedError()


def _is_peer_failure(error: Exception) -> bool:
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in message for sign in _SIGNS_OF_THE_OTHERS)


def _peer_failure(run_url: str, ranks: Ranks, hosts: Sequence[str]) -> D2IError:
    ended = ranks.missing_ranks()
    speaks = ranks.claim_report()
    if speaks is None:
        # The first rank, which holds the store, is gone: the lowest rank on each host reports.
        speaks = ranks.rank == min(r for r in range(1, len(hosts)) if hosts[r] == hosts[ranks.rank])
    return lost_ranks(ended, hosts, run_url) if speaks else AlreadyReportedError()


_NUM_SHOWN = 8


class RankError(ClusterError):
    """An error that only this rank has, so that this rank must report it."""


class DivergedError(D2IError):
    """A loss, weight or moment that is not finite."""


def check_finite(
    losses: Sequence[float], first_step: int, keys: dict[int, list[str]], config: TrainConfig
) -> None:
    """Check that the loss of every step is finite.

    Args:
        losses: Loss of each step, from `first_step`.
        first_step: Number of the first of these steps; a run's first step is 1.
        keys: By step with a non-finite loss, the sample keys of the micro batches that had it.
        config: The settings to advise on.

    Raises:
        DivergedError: Naming the first such step and its samples.
    """
    for step, loss in enumerate(losses, first_step):
        if not math.isfinite(loss):
            named = keys.get(step, [])
            shown = ", ".join(named[:_NUM_SHOWN]) + (", …" if len(named) > _NUM_SHOWN else "")
            raise DivergedError(
                f"the loss of step {step} is {loss} (samples {shown}); expected a finite "
                f"number; {_weights_hint(config)}; if it is always the same samples, look at "
                "them with d2i inspect"
            )


def check_weights(runs: Mapping[str, Tensor], step: int, config: TrainConfig) -> None:
    """Check that all numbers of a checkpoint are finite: a run could not resume from others.

    Args:
        runs: The slices that a rank is to write, by name.
        step: Number of steps taken.
        config: The settings to advise on.

    Raises:
        DivergedError: Naming the step and the parameter.
    """
    for name, numbers in runs.items():
        # One pass over memory; if any number is NaN, it is both the minimum and the maximum.
        if not all(extreme.isfinite() for extreme in numbers.aminmax()):
            raise DivergedError(
                f"{name.partition(':')[2].rpartition(':')[0]} is not finite after step "
                f"{step}, though the loss was, so no checkpoint is written; expected finite "
                f"weights and moments; {_weights_hint(config)}"
            )


def _weights_hint(config: TrainConfig) -> str:
    return (
        f"start another --run with train.optim.lr below {config.optim.lr:g}, or with "
        f"train.optim.num_warmup_steps above {config.optim.num_warmup_steps}"
        + ("" if config.precision == "fp32" else ", or with train.precision=fp32")
    )


def explain_error(error: BaseException, run_url: str, config: TrainConfig) -> D2IError | None:
    """Return the error for the user in place of an exception on this rank; None for a bug."""
    where = f"rank {os.environ.get('RANK', '0')} on {platform.node()}"
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return RankError(f"{where} is out of memory; {_memory_advice(config)}")
    if isinstance(error, OSError) and storage.is_disk_full(error):
        return RankError(
            f"{where} cannot write {error.filename or run_url}: {error.strerror}; partly "
            f"written files are ignored; free some disk space, then {resume_hint(run_url)}"
        )
    if isinstance(error, OSError) and error.filename is not None:
        return RankError(
            f"{where} cannot read or write {error.filename}: {error.strerror or error}; check its "
            f"permissions, then {resume_hint(run_url)}"
        )
    if any(kind.__name__ == "BackendCompilerFailed" for kind in type(error).__mro__):
        return RankError(
            f"{where} cannot compile the network: {str(error).splitlines()[0]}; expected a C++ "
            "compiler and, on a GPU, Triton, because train.compile is true; install what is "
            "missing, or continue with --set train.compile=false"
        )
    return None


def lost_ranks(ended: Sequence[int], hosts: Sequence[str], run_url: str) -> D2IError:
    """Return an error that names the ranks that no longer respond."""
    named = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in ended) or "an unknown rank"
    return RankError(
        f"{named} ended, so the others cannot continue; expected {len(hosts)} ranks; see its own "
        f"error line or that host's log (out of memory, or killed), then {resume_hint(run_url)}"
    )


def resume_hint(run_url: str) -> str:
    """Return the hint that the same command resumes, and from which checkpoint."""
    whole = complete_checkpoints(run_url)
    newest = whole[-1].rpartition("/")[2] if whole else "the start"
    return f"resume with the same command, from {newest}"


def _memory_advice(config: TrainConfig) -> str:
    settings = []
    if config.micro_batch_size > 1:
        settings.append(f"train.micro_batch_size={config.micro_batch_size // 2}")
    if not config.activation_checkpointing:
        settings.append("train.activation_checkpointing=true")
    if config.zero_stage < 3:
        settings.append(f"train.zero_stage={config.zero_stage + 1}")
    return f"use --set {' or --set '.join(settings)}" if settings else "use more or larger devices"
