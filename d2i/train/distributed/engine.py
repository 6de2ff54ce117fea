"""The DeepSpeed engine and its float32 weights; the only module that imports DeepSpeed."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2i.config import TrainConfig
from d2i.errors import ClusterError, ConfigError
from d2i.train.distributed.ranks import Ranks

_ZERO = "zero_optimization"


@dataclass(frozen=True)
class Part:
    """A slice of one parameter, and its position in this rank's optimizer.

    Args:
        name: The parameter's published key.
        start: Index of its first element in the flattened parameter.
        length: Number of elements.
        master: Index of the tensor in `master_weights`.
        offset: Index of its first element in that flattened tensor.
        is_shared: True if every rank holds the same slice.
    """

    name: str
    start: int
    length: int
    master: int
    offset: int
    is_shared: bool

    def of(self, tensors: list[Tensor]) -> Tensor:
        """Return the part as a flat view into tensors shaped like the masters."""
        return tensors[self.master].detach().view(-1)[self.offset : self.offset + self.length]


def join_ranks() -> Ranks:
    """Join the process group; every rank must call this."""
    deepspeed = _import_deepspeed()
    if not torch.cuda.is_available():
        # One thread per rank: sums are taken in one order, whatever the number of cores.
        torch.set_num_threads(1)
        # The shared-memory kernel serves inference only, and would need a C++ compiler here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
    distributed = torch.distributed
    return Ranks(
        rank=distributed.get_rank(),
        world_size=distributed.get_world_size(),
        device=torch.device(deepspeed.accelerator.get_accelerator().current_device_name()),
        control=distributed.new_group(backend="gloo"),
    )


def build_engine(
    network: nn.Module,
    config: TrainConfig,
    world_size: int,
    zero: Mapping[str, Any] | None = None,
) -> Any:
    """Return a DeepSpeed engine around the network, with AdamW over what requires a gradient.

    Weight decay acts on every parameter that is trained, as published (`utils.py` of U-ViT).

    With precision `bf16` DeepSpeed runs in fp32; the network itself applies autocast
    (`network.autocast_to`). DeepSpeed's `torch_autocast` would round the linear layers' gradients
    when ranks exchange them, from stage 2 on those of each micro batch, and let each rank choose
    its own loss scale. Its `data_types.grad_accum_dtype` accumulates gradients that are already
    rounded, and stage 0 rejects it.

    Args:
        network: In float32; its weights become the engine's.
        config: Batches, optimizer, precision and ZeRO stage.
        world_size: Number of ranks that share the global batch.
        zero: DeepSpeed's `zero_optimization` settings. By default only the stage: 0 for one rank
            with float32 weights, or with bf16 weights on a CPU, else the recipe's.

    Raises:
        ConfigError: If the ranks cannot share the global batch, or the ZeRO stage cannot train a
            compiled network.
        ClusterError: If the device cannot compute in the precision.
    """
    deepspeed = _import_deepspeed()
    if config.precision == "fp16_weights" and not _has_fp16(deepspeed):
        raise ClusterError(
            "train.precision is fp16_weights, which this device does not support; use --set "
            "train.precision=bf16"
        )
    micro_batch_size, num_micro_batches = config.accumulation(world_size)
    optim = config.optim
    optimizer = torch.optim.AdamW(
        [parameter for _, parameter in trained_parameters(network)],
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=True,
    )
    settings = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": num_micro_batches,
        _ZERO: zero_settings(config, world_size, zero),
        "zero_allow_untested_optimizer": True,
        # With a client's optimizer DeepSpeed would require its C++ one, which must be compiled.
        "zero_force_ds_cpu_optimizer": False,
        # DeepSpeed's own default would clip at 1.
        "gradient_clipping": optim.max_grad_norm or 0.0,
        "bf16": {"enabled": config.precision == "bf16_weights"},
        "fp16": {"enabled": config.precision == "fp16_weights"},
        "steps_per_print": 2**31,
    }
    weights = {name: parameter.detach() for name, parameter in trained_parameters(network)}
    engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=settings)
    if config.precision.endswith("_weights"):
        _fill_masters(engine, weights)
    if world_size == 1 and engine.zero_optimization_stage() == 0:
        # No rank to average gradients with; DeepSpeed would copy them out and back for nothing.
        engine.enable_backward_allreduce = False
    return engine


def trained_parameters(network: Any) -> list[tuple[str, Any]]:
    """Return the parameters that require a gradient, each with its name, in the network's order."""
    return [(name, p) for name, p in network.named_parameters() if p.requires_grad]


def zero_settings(
    config: TrainConfig,
    world_size: int,
    zero: Mapping[str, Any] | None = None,
    *,
    is_cpu: bool | None = None,
) -> dict[str, Any]:
    """Return DeepSpeed's `zero_optimization` settings; see `build_engine`.

    Args:
        config: Precision and ZeRO stage.
        world_size: Number of ranks.
        zero: Those that the user gave.
        is_cpu: True if ranks compute on CPUs; by default, as on this machine.

    Raises:
        ConfigError: If the ZeRO stage cannot train a compiled network.
    """
    is_cpu = not torch.cuda.is_available() if is_cpu is None else is_cpu
    stage = 0 if world_size == 1 and _zero_is_no_op(config, is_cpu=is_cpu) else config.zero_stage
    settings = dict(zero or {"stage": stage})
    if config.compile and settings["stage"] == 3:
        raise ConfigError(
            "train.compile=true does not work with ZeRO stage 3, which gathers weights while a "
            "block is computed; expected stage 0, 1 or 2; use --set train.zero_stage=2 or --set "
            "train.compile=false"
        )
    return settings


def with_zero_defaults(settings: Mapping[str, Any]) -> Any:
    """Return `zero_optimization` settings as DeepSpeed reads them: what is unset has its default.

    Raises:
        ConfigError: If DeepSpeed refuses them.
    """
    _import_deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        return DeepSpeedZeroConfig(**settings)
    except ValueError as err:
        reason = " ".join(str(err).split())[:200]
        raise ConfigError(
            f"{_ZERO}: {reason}; expected settings that DeepSpeed has; see train/zero-2.json"
        ) from err


def _zero_is_no_op(config: TrainConfig, *, is_cpu: bool) -> bool:
    """Return whether ZeRO on a single rank would only copy and give the same numbers as stage 0.

    With weights in half precision, stage 0 checks every gradient separately for finite numbers,
    which stalls an accelerator; in float16 it also scales the loss by other rules.
    """
    is_bf16_on_cpu = config.precision == "bf16_weights" and is_cpu
    return not config.precision.endswith("_weights") or is_bf16_on_cpu


def read_zero(path: Path) -> dict[str, Any]:
    """Read DeepSpeed's `zero_optimization` settings from a JSON file such as `train/zero-2.json`.

    Raises:
        ConfigError: If it cannot be read, has no stage, or holds other settings, which belong in
            the recipe.
    """
    try:
        content = json.loads(path.read_text())
        zero: dict[str, Any] = content[_ZERO]
        stage = zero["stage"]
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise ConfigError(
            f'--zero {path}: {err!r}; expected JSON such as {{"{_ZERO}": {{"stage": 2}}}}; '
            "see train/zero-2.json"
        ) from err
    if set(content) != {_ZERO} or stage not in (0, 1, 2, 3):
        raise ConfigError(
            f"--zero {path}: has {', '.join(content)} with stage {stage}; expected only {_ZERO}, "
            "with a stage from 0 to 3; set batches, optimizer and precision in the recipe (--set)"
        )
    return zero


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """Return the AdamW under the engine's ZeRO wrapper."""
    optimizer = engine.optimizer
    while not isinstance(optimizer, torch.optim.AdamW):
        optimizer = optimizer.optimizer
    return optimizer


def master_weights(engine: Any) -> list[Tensor]:
    """Return the float32 tensors that this rank's optimizer updates: partitions under ZeRO."""
    if engine.zero_optimization_stage() == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [p for group in base_optimizer(engine).param_groups for p in group["params"]]


@torch.no_grad()
def _fill_masters(engine: Any, weights: Mapping[str, Tensor]) -> None:
    """Fill the masters from the float32 weights; DeepSpeed fills them from the rounded ones."""
    masters = master_weights(engine)
    for part in list_parts(engine):
        whole = weights[part.name].reshape(-1)
        part.of(masters).copy_(whole[part.start : part.start + part.length])


def list_parts(engine: Any) -> list[Part]:
    """Return all parts of trained parameters that this rank's masters hold."""
    if engine.zero_optimization_stage() == 3:
        return _parts_of_stage_3(engine)
    places = enumerate(master_weights(engine))
    masters = {master.untyped_storage().data_ptr(): number for number, master in places}
    parts = []
    for number, (name, parameter) in enumerate(trained_parameters(engine.module)):
        if not hasattr(parameter, "_hp_mapping"):
            parts.append(Part(name, 0, parameter.numel(), number, 0, is_shared=True))
        elif parameter._hp_mapping is not None:
            mapping = parameter._hp_mapping
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            owner = masters[mapping.hp_fragment.untyped_storage().data_ptr()]
            parts.append(Part(name, here.start, here.numel, owner, there.start, is_shared=False))
    return parts


def _parts_of_stage_3(engine: Any) -> list[Part]:
    """Return this rank's parts in stage 3: an equal slice of every parameter, the last padded."""
    optimizer, parts = engine.optimizer, []
    for name, parameter in trained_parameters(engine.module):
        position = optimizer.grad_position[optimizer.get_param_id(parameter)]
        master, offset, length = position
        start = torch.distributed.get_rank() * length
        length = min(length, parameter.ds_numel - start)
        if length > 0:
            parts.append(Part(name, start, length, master, offset, is_shared=False))
    return parts


def loss_scaler_state(engine: Any) -> dict[str, float]:
    """Return the state of float16's dynamic loss scale; empty in other precisions."""
    scaler = _loss_scaler(engine)
    names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
    return {name: getattr(scaler, name) for name in names if hasattr(scaler, name)}


def restore_loss_scaler(engine: Any, state: Mapping[str, float]) -> None:
    """Restore the state of float16's dynamic loss scale."""
    for name, value in state.items():
        setattr(_loss_scaler(engine), name, value)


def _loss_scaler(engine: Any) -> Any:
    """Return the object that holds the loss scale, or None in other precisions than float16.

    It is the optimizer's loss scaler under ZeRO, else its loss scale config or the optimizer.
    """
    optimizer = engine.optimizer
    if not engine.fp16_enabled():
        return None
    for name in ("loss_scaler", "loss_scale_config"):
        if hasattr(optimizer, name):
            return getattr(optimizer, name)
    return optimizer


def _has_fp16(deepspeed: Any) -> bool:
    return bool(deepspeed.accelerator.get_accelerator().is_fp16_supported())


def _import_deepspeed() -> Any:
    # DeepSpeed and its op builders log on import; a rank prints its own progress line.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    return deepspeed
