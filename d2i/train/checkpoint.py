"""Checkpoints: whole or absent, safetensors and JSON only, so that resuming unpickles nothing.

`checkpoints/step-N/` holds one file a rank (float32 weights, AdamW moments and EMA, as that rank
holds them), the whole EMA under its published keys, and last of all `complete.json`.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from d2i import storage
from d2i.errors import CheckpointError
from d2i.fault import Fault
from d2i.models import save_weights
from d2i.train.ema import Ema
from d2i.train.engine import base_optimizer, full_weights, master_weights

_MARKER = "complete.json"
_PENDING = "losses"
_IS_OURS = re.compile(r"step-\d+|\.step-\d+\.tmp")
_NUM_KEPT = 2


@dataclass(frozen=True)
class Progress:
    """How far a run is: counted in optimizer steps, over all ranks.

    Args:
        step: Optimizer steps taken.
        elapsed_s: Seconds of training, those before an interruption included.
        losses: This rank's losses since the last line of `metrics.jsonl`.
    """

    step: int
    elapsed_s: float
    losses: tuple[float, ...] = ()


def save_checkpoint(
    run_dir: Path, engine: Any, ema: Ema, progress: Progress, fault: Fault | None = None
) -> None:
    """Write a checkpoint; every rank must call this, and none returns before it is whole."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    target = run_dir / "checkpoints" / f"step-{progress.step}"
    scratch = target.with_name(f".{target.name}.tmp")
    if rank == 0:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)
        scratch.mkdir(parents=True)
    torch.distributed.barrier()
    pending = torch.tensor(progress.losses, dtype=torch.float64)
    state = _rank_state(engine, ema) | {_PENDING: pending}
    save_file(state, scratch / _rank_file(rank, world_size))
    storage.sync(scratch / _rank_file(rank, world_size))
    averaged = ema.read_in_place(lambda: full_weights(engine))
    if rank == 0:
        save_weights(averaged, scratch / "ema.safetensors")
    torch.distributed.barrier()
    if rank == 0:
        scratch.rename(target)
        if fault:
            fault.reach("train.checkpoint_written")
        _write_marker(target, progress, world_size)
        _prune(run_dir)
    torch.distributed.barrier()


def load_newest_checkpoint(run_dir: Path, engine: Any, ema: Ema) -> Progress:
    """Continue from the newest whole checkpoint, or from the start where there is none.

    Raises:
        CheckpointError: If it was written by another number of ranks, or cannot be read.
    """
    newest = newest_checkpoint(run_dir)
    if newest is None:
        return Progress(step=0, elapsed_s=0.0)
    marker = json.loads((newest / _MARKER).read_text())
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if marker["world_size"] != world_size:
        raise CheckpointError(
            f"{newest} was written by {marker['world_size']} ranks, got {world_size}; expected "
            f"the same; repeat with --num-accelerators {marker['world_size']}"
        )
    try:
        state = load_file(newest / _rank_file(rank, world_size))
    except (OSError, ValueError) as err:
        raise CheckpointError(
            f"{newest} cannot be read: {err}; expected a whole checkpoint; delete this folder and "
            "repeat the command, and the one before is taken"
        ) from err
    _restore(state, engine, ema)
    return Progress(marker["step"], marker["elapsed_s"], tuple(state[_PENDING].tolist()))


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the folder of the newest whole checkpoint."""
    whole = _whole_checkpoints(run_dir)
    return whole[-1] if whole else None


def _rank_state(engine: Any, ema: Ema) -> dict[str, Tensor]:
    optimizer = base_optimizer(engine)
    state: dict[str, Tensor] = {}
    for i, (weight, average) in enumerate(zip(master_weights(engine), ema.tensors, strict=True)):
        moments = optimizer.state[weight]
        state[f"{i}.weight"] = weight.detach().cpu().clone()
        state[f"{i}.ema"] = average.cpu().clone()
        for name in ("exp_avg", "exp_avg_sq", "step"):
            state[f"{i}.{name}"] = moments[name].detach().cpu().clone()
    return state


@torch.no_grad()
def _restore(state: dict[str, Tensor], engine: Any, ema: Ema) -> None:
    optimizer = base_optimizer(engine)
    for i, (weight, average) in enumerate(zip(master_weights(engine), ema.tensors, strict=True)):
        weight.data.copy_(state[f"{i}.weight"])
        average.copy_(state[f"{i}.ema"])
        optimizer.state[weight] = {
            name: state[f"{i}.{name}"].to(weight.device)
            for name in ("exp_avg", "exp_avg_sq", "step")
        }
    # Under ZeRO the network holds copies of the weights; they follow only after a step.
    whole = full_weights(engine)
    for name, parameter in engine.module.named_parameters():
        parameter.data.copy_(whole[name])


def _rank_file(rank: int, world_size: int) -> str:
    return f"rank-{rank}-of-{world_size}.safetensors"


def _write_marker(folder: Path, progress: Progress, world_size: int) -> None:
    marker = {
        "step": progress.step,
        "elapsed_s": progress.elapsed_s,
        "world_size": world_size,
    }
    scratch = folder / f".{_MARKER}"
    scratch.write_text(json.dumps(marker))
    storage.sync(scratch)
    scratch.rename(folder / _MARKER)
    storage.sync(folder)


def _whole_checkpoints(run_dir: Path) -> list[Path]:
    markers = (run_dir / "checkpoints").glob(f"step-*/{_MARKER}")
    return sorted((m.parent for m in markers), key=lambda p: int(p.name.removeprefix("step-")))


def _prune(run_dir: Path) -> None:
    """Keep the newest checkpoints, and remove what killed attempts left of others."""
    whole = _whole_checkpoints(run_dir)
    for folder in whole[:-_NUM_KEPT]:
        (folder / _MARKER).unlink()
    for folder in (run_dir / "checkpoints").iterdir():
        if _IS_OURS.fullmatch(folder.name) and not (folder / _MARKER).exists():
            shutil.rmtree(folder)
