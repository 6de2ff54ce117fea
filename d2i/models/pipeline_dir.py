"""The directory of a diffusers pipeline: which parts it has, and the numbers in their files.

`model_index.json` names the parts; each has a subdirectory. A repository in the hub's local cache
is such a directory too. Nothing is fetched, and no pickle is read.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from d2i.backbones import Presets
from d2i.config import NUM_NOISE_LEVELS
from d2i.errors import CheckpointError
from d2i.io import storage
from d2i.io.parse import parse_json
from d2i.models.licence import HUB, Licence, read_licence
from d2i.models.weights.load import update_state_hash

_INDEX = "model_index.json"
_SCHEDULER = "scheduler/scheduler_config.json"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
# Neither changes a latent, and both are often left out.
_OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")
_VELOCITIES = "flow_prediction"
# The directory of a repository in the hub's local cache.
_SNAPSHOT = re.compile(r"/models--([^/]+)/snapshots/[^/]+")


class PipelineDirectory:
    """A pipeline of one class, saved by `save_pretrained`.

    Args:
        name: A directory, or a repository in the hub's local cache.
        presets: Of the family, which says the class of the pipeline, and the part that is trained.

    Attributes:
        name: Its name, or that of the repository.
        repository: The repository on the hub that it is in the local cache of; None for others.
        path: The directory.

    Raises:
        CheckpointError: If there is none, it is of another class, a part is missing, or its
            network is quantised, distilled, or does not predict what the family trains.
    """

    def __init__(self, name: str, presets: Presets) -> None:
        self.path = local_directory(
            name, f"{presets.pipeline} that save_pretrained wrote", "--set backbone.weights=DIR"
        )
        self.name = Path(name).name if Path(name).is_dir() else name
        cached = _SNAPSHOT.search(str(self.path.absolute()))
        self.repository = cached[1].replace("--", "/") if cached else None
        self.network_part = presets.network_part
        self._presets = presets
        index = read_index(self.path)
        self._check_not_distilled(name, index)
        if (found := index.get("_class_name")) != presets.pipeline:
            raise CheckpointError(
                f"{name} is a {found}; expected a {presets.pipeline}; choose the backbone of that "
                "pipeline"
            )
        parts = {part: kind for part, kind in index.items() if _is_part(part, kind)}
        for part in parts:
            if part not in _OPTIONAL and not (self.path / part).is_dir():
                raise CheckpointError(
                    f"{name}: its {part} is missing; expected a directory {part} beside {_INDEX}; "
                    "copy the whole pipeline"
                )
        self._scheduler_class = str(parts.get("scheduler", ("", ""))[1])
        self._check_network(name)

    def _check_network(self, name: str) -> None:
        import diffusers

        if "quantization_config" in self.part_config(self.network_part):
            raise CheckpointError(
                f"{name}: its {self.network_part} is quantised, which cannot be trained yet; "
                "expected weights in float32, bfloat16 or float16; use the pipeline as published"
            )
        numbers = self._read(_SCHEDULER)
        num_levels = numbers.get("num_train_timesteps", NUM_NOISE_LEVELS)
        if num_levels != NUM_NOISE_LEVELS or not hasattr(diffusers, self._scheduler_class):
            raise CheckpointError(
                f"{name}: its scheduler is {self._scheduler_class} with {num_levels} noise levels; "
                f"expected one of diffusers' with {NUM_NOISE_LEVELS}; use another base model"
            )
        predicted = numbers.get("prediction_type", "epsilon")
        if self._scheduler_class.startswith("FlowMatch"):
            predicted = _VELOCITIES
        expected = _VELOCITIES if self._presets.is_flow else "epsilon"
        if predicted != expected:
            raise CheckpointError(
                f"{name}: its scheduler has prediction_type {predicted}; expected {expected}, as "
                f"{self._presets.pipeline} is trained here; use another base model"
            )

    def _check_not_distilled(self, name: str, index: Mapping[str, Any]) -> None:
        """Refuse networks that generate in few steps, which training by this loss would undo."""
        marks = self._presets.distilled
        flagged = ["distilled"] if index.get("is_distilled") else []
        words = f"{self.name} {self.repository or ''} {index.get('_class_name')}".lower()
        # A "de-turbo" is trained back.
        if found := [*flagged, *(m for m in marks if re.search(rf"(?<!de)(?<!de-){m}", words))]:
            base = marks.get(found[0], next(iter(marks.values()), "its base model"))
            raise CheckpointError(
                f"{name} is distilled to generate in few steps ({found[0]}), which training would "
                f"undo; expected its base model, such as {base}; to evaluate it as it is, pass "
                f"--system diffusers:{name}"
            )

    def part_config(self, part: str) -> Mapping[str, Any]:
        """Return the `config.json` of a part."""
        return read_part_config(self.path, part)

    def scheduler(self) -> Any:
        """Return diffusers' scheduler, with the numbers of its file, on the CPU."""
        import diffusers

        kind: Any = getattr(diffusers, self._scheduler_class)
        # A network may be built on the meta device meanwhile, which holds no numbers.
        with torch.device("cpu"):
            return kind.from_config(self._read(_SCHEDULER))

    def betas(self) -> npt.NDArray[np.float64]:
        """Return the variance that each noise level adds, as the scheduler's file gives it."""
        from diffusers import DDPMScheduler

        with torch.device("cpu"):
            scheduler = DDPMScheduler.from_config(self._read(_SCHEDULER))
        betas: npt.NDArray[np.float64] = scheduler.betas.double().numpy()
        return betas

    def missing_options(self) -> list[str]:
        """Return the optional parts that the index names and the directory does not have."""
        index = self._read(_INDEX)
        named = [part for part in _OPTIONAL if _is_part(part, index.get(part))]
        return [part for part in named if not (self.path / part).is_dir()]

    def licence(self) -> Licence | None:
        """Return the licence that its README.md names; None if there is none that does."""
        return read_licence(self.path, self.repository)

    def describe_licence(self) -> str:
        """Return the licence in words, and where it is from; it may be unknown."""
        if licence := self.licence():
            return (
                f"Its README.md names its licence, {licence.words}, which holds for what was "
                "trained, too."
            )
        where = f" ({HUB}/{self.repository})" if self.repository else ""
        published = self._presets.published_licence
        hint = f" The published weights of this family are under {published}." if published else ""
        return (
            "Its licence, which holds for what was trained, too, is not named by a README.md in "
            f"its directory: look where it was published{where}.{hint}"
        )

    def without_weights(self, part: str) -> Any:
        """Build a part on the meta device, with the numbers of its buffers alone."""
        import diffusers

        config = self.part_config(part)
        kind: Any = getattr(diffusers, str(config.get("_class_name")), None)
        if kind is None:
            raise CheckpointError(
                f"{self.name}: its {part} is a {config.get('_class_name')}; expected a network of "
                "diffusers; copy the whole pipeline"
            )
        with torch.device("meta"):
            module = kind.from_config(config)
        if names := {name for name, _ in module.named_buffers()}:
            held = {name: tensor for name, tensor in self.part_weights(part) if name in names}
            module.load_state_dict(held, strict=False, assign=True)
        return module

    def network_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Read the network's tensors, in the order of their names."""
        return self.part_weights(self.network_part)

    def part_weights(self, part: str) -> Iterator[tuple[str, Tensor]]:
        """Read the tensors of a part, in the order of their names."""
        directory = self.path / part
        index = directory / f"{_WEIGHTS}.index.json"
        try:
            names = [_WEIGHTS]
            if index.is_file():
                held = self._read(f"{part}/{index.name}")["weight_map"]
                names = sorted(set(held.values()))
            with ExitStack() as stack:
                opened = [
                    stack.enter_context(safe_open(directory / name, framework="pt"))
                    for name in names
                ]
                places = {key: file for file in opened for key in file.keys()}  # noqa: SIM118
                for key in sorted(places):
                    yield key, places[key].get_tensor(key)
        except (OSError, SafetensorError, KeyError, TypeError) as err:
            raise CheckpointError(
                f"{directory}: cannot read its weights: {str(err)[:200]}; expected {_WEIGHTS}; "
                "copy the whole pipeline, with its safetensors files"
            ) from err

    def network_sha256(self) -> str:
        """Return the sha256 of the network's state in float32, as `weights_hash` does."""
        digest = hashlib.sha256()
        for name, tensor in self.network_weights():
            update_state_hash(digest, name, tensor.float())
        return digest.hexdigest()

    def _read(self, file: str) -> dict[str, Any]:
        return _read_json(self.path / file)


def read_index(path: Path) -> dict[str, Any]:
    """Return the index of a pipeline's directory: its class, and the class of each part.

    Args:
        path: The directory.

    Raises:
        CheckpointError: If there is none, or it is damaged.
    """
    return _read_json(path / _INDEX)


def read_part_config(path: Path, part: str) -> dict[str, Any]:
    """Return the `config.json` of a part of a pipeline's directory.

    Args:
        path: The directory.
        part: The name of the part.

    Raises:
        CheckpointError: If there is none, or it is damaged.
    """
    return _read_json(path / f"{part}/config.json")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist; expected it in the directory of a pipeline; copy the "
            "whole pipeline"
        )
    return parse_json(
        storage.read_bytes(str(path)),
        str(path),
        error=CheckpointError,
        next_step="copy it again from its source",
    )


def _is_part(part: str, kind: Any) -> bool:
    return not part.startswith("_") and isinstance(kind, list) and None not in kind


def local_directory(name: str, expected: str, option: str) -> Path:
    """Return a directory, or that of a repository in the local cache.

    Args:
        name: A directory, or a repository.
        expected: Its content, for the error.
        option: The option that names it, for the error.

    Raises:
        CheckpointError: If there is neither.
    """
    path = Path(name)
    if not storage.names_host(name) and path.is_dir():
        return path
    if name.count("/") == 1 and not path.is_absolute():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(snapshot_download(name, local_files_only=True))
        except LocalEntryNotFoundError as err:
            # diffusers downloads the files of the pipeline alone: newer versions of the library
            # call that incomplete.
            if snapshot := getattr(err, "snapshot_path", None):
                return Path(snapshot)
        except ValueError:
            pass
    raise CheckpointError(
        f"{name}: no such directory, and no such repository in the hub's local cache; expected a "
        f"{expected}; give {option}"
    )
