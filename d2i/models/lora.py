"""Low-rank adapters (LoRA): peft's layers in a network, and the file that pipelines load.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021). Only the adapter requires a
gradient, so optimizer, averages and checkpoints hold it alone.
"""

from __future__ import annotations

import fnmatch
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from d2i.backbones import Presets
from d2i.config import AdapterConfig
from d2i.diffusion.draws import normal
from d2i.errors import ClusterError, ConfigError

# peft's name for an adapter that has none; it stands in the parameters' names.
_NAME = "default"
_PURPOSE = "lora"
_ALL_LINEAR = "all-linear"
# A layer in a list of blocks.
_IN_BLOCK = re.compile(r"\.\d+\.")


def add_lora(network: Any, config: AdapterConfig, presets: Presets, seed: int) -> None:
    """Freeze a network, and add a LoRA that changes nothing yet.

    The first matrix of a pair is drawn from N(0, 1/rank^2), as diffusers' training scripts do, here
    keyed by (seed, name of the parameter); the second is 0.

    Args:
        network: A network of diffusers.
        config: Rank, scale and targets.
        presets: Of the network's family; its targets are the default.
        seed: The seed of the run.

    Raises:
        ClusterError: If peft is not installed.
        ConfigError: If a target does not exist in the network, or cannot be adapted.
    """
    named, targets = _names(config, presets), _layers(network, config, presets)
    lora = _peft_config(config, targets)
    network.requires_grad_(requires_grad=False)
    try:
        network.add_adapter(lora, adapter_name=_NAME)
    except ValueError as err:
        reason = str(err).splitlines()[0][:200]
        raise ConfigError(
            f"adapter.targets is {', '.join(named)}: {reason}; expected names of "
            f"linear or convolution layers, such as {', '.join(presets.lora_targets)}"
        ) from err
    firsts = {name: p for name, p in network.named_parameters() if ".lora_A." in name}
    for target in targets:
        if not any(target in name for name in firsts):
            raise _no_layer(target, presets)
    for name, parameter in firsts.items():
        drawn = normal(seed, _PURPOSE, [name], 0, tuple(parameter.shape))[0]
        parameter.data.copy_(torch.from_numpy(drawn) / config.rank)


def pack_lora(
    state: Mapping[str, Tensor], config: AdapterConfig, presets: Presets
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the content of the file that the stock pipeline's `load_lora_weights` reads.

    Args:
        state: The adapter's parameters, by the names they have in the network.
        config: The adapter's settings; rank and alpha stand in the file's metadata, without which
            it would be loaded at another scale.
        presets: Of the network's family.

    Returns:
        Tensors by the published names, and the metadata of the file.
    """
    import diffusers
    from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers

    plain = {name.replace(f".{_NAME}.", "."): tensor for name, tensor in state.items()}
    targets = _names(config, presets)
    if any(_is_pattern(target) for target in targets):
        targets = list({name.rpartition(".lora_")[0] for name in plain})
    described = _peft_config(config, targets).to_dict()
    described["target_modules"] = sorted(targets)
    pipeline = getattr(diffusers, presets.pipeline or "")
    # The published scripts give UNets' attention layers names from before peft. In a file with
    # names of both kinds, pipelines would load only some.
    older = convert_state_dict_to_diffusers(plain) if presets.network_part == "unet" else plain
    layers = plain if any(".lora_A." in name for name in older) else older
    with tempfile.TemporaryDirectory() as directory:
        pipeline.save_lora_weights(
            directory,
            **{
                f"{presets.network_part}_lora_layers": layers,
                f"{presets.network_part}_lora_adapter_metadata": described,
            },
        )
        (file,) = Path(directory).iterdir()
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            return tensors, dict(opened.metadata())


def _no_layer(target: str, presets: Presets) -> ConfigError:
    return ConfigError(
        f"adapter.targets: no layer of the network is named {target}; expected names such as "
        f"{', '.join(presets.lora_targets)}"
    )


def _names(config: AdapterConfig, presets: Presets) -> list[str]:
    """Return the targets that a recipe names: layers, or patterns of them."""
    if config.targets == "all-linear":
        return [_ALL_LINEAR]
    named = config.targets if isinstance(config.targets, tuple) else presets.lora_targets
    return list(named)


def _is_pattern(target: str) -> bool:
    return "*" in target or target == _ALL_LINEAR


def _layers(network: nn.Module, config: AdapterConfig, presets: Presets) -> list[str]:
    """Return the targets in a network, with every pattern replaced by the layers that it means."""
    modules = dict(network.named_modules())
    found = []
    for target in _names(config, presets):
        if target == _ALL_LINEAR:
            found += [
                name
                for name, module in modules.items()
                if isinstance(module, nn.Linear) and _IN_BLOCK.search(name)
            ]
        elif _is_pattern(target):
            adapted = (nn.Linear, nn.Conv2d)
            layers = [
                name
                for name in fnmatch.filter(modules, target)
                if isinstance(modules[name], adapted)
            ]
            if not layers and config.targets not in (None, "script"):
                raise _no_layer(target, presets)
            found += layers
        else:
            found.append(target)
    return found


def _peft_config(config: AdapterConfig, targets: list[str]) -> Any:
    try:
        from peft import LoraConfig
    except ImportError as err:
        raise ClusterError("adapter.kind=lora needs peft; pip install 'd2i[lora]'") from err
    return LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets)
