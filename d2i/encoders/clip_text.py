"""The CLIP text encoder: token ids to text latents, and to embeddings in CLIP image's space."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from d2i.config import EncodersConfig, Precision
from d2i.encoders.pretrained import (
    freeze,
    load_pretrained,
    module_bytes,
    pretrained_bytes,
    run_padded,
    weights_hash,
)
from d2i.errors import CheckpointError, ConfigError
from d2i.io.parse import parse_json
from d2i.models.weights.load import update_state_hash
from d2i.tokenize import WINDOW_LENGTH
from d2i.weights_resolve import resolve_weights

_NUM_CLIP_IDS = 49408
_CONFIG_NAME = "config.json"
_PROJECTION = "text_projection.weight"


class ClipText:
    """A frozen CLIP text tower, run on 77-token windows without an attention mask.

    No mask is ever passed: the published pipelines pass none, and one would change the padded
    positions (docs/models.md, Text and CLIP).

    The text encoder of a pipeline, which has no projection, is one too; it cannot `embed`.

    A directory may hold `clip_ids.json`, a list whose entry i is the true CLIP id of row i of a
    compact vocabulary; every other id then becomes row 0.
    """

    def __init__(
        self,
        name: str,
        prefix: str | None = None,
        device: str = "cpu",
        precision: Precision = "fp32",
    ) -> None:
        self.device, self._precision, self._name = device, precision, name
        kind = _module_class(name)
        self._has_projection = kind.__name__ != "CLIPTextModel"
        self.module = load_pretrained(kind, name).to(device)
        self.prefix = _load_prefix(prefix).to(device) if prefix else None
        self.dim: int = self.prefix.out_features if self.prefix else self.module.config.hidden_size
        self._rows = _compact_rows(Path(resolve_weights(name)) / "clip_ids.json")
        self.hash = weights_hash(nn.ModuleList([self.module, *filter(None, [self.prefix])]))

    @property
    def tower_hash(self) -> str:
        """The sha256 of what text latents depend on: not of the projection, or a key's prefix."""
        digest = hashlib.sha256()
        state = self.module.state_dict()
        plain = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
        for name in sorted(plain.keys() - {_PROJECTION}):
            update_state_hash(digest, name, plain[name])
        return digest.hexdigest()

    @torch.inference_mode()
    def encode(self, tokens: NDArray[np.uint16], batch_size: int) -> NDArray[np.float32]:
        """Encode uint16 (N, 77 W) to the last hidden state, float32 (N, 77 W, text_dim)."""
        windows = self._ids(tokens).reshape(-1, WINDOW_LENGTH)  # (N W, 77)
        hidden = run_padded(self._hidden, windows, batch_size, self.device, self._precision)
        return hidden.reshape(len(tokens), -1, hidden.shape[-1])

    @torch.inference_mode()
    def embed(self, tokens: NDArray[np.uint16], batch_size: int) -> NDArray[np.float32]:
        """Embed uint16 (N, 77) in the space of the CLIP image tower: float32 (N, clip_dim).

        Raises:
            ConfigError: If the encoder has no projection into that space.
        """
        if not self._has_projection:
            raise ConfigError(
                f"{self._name} has no projection to CLIP's embeddings; expected a whole CLIP "
                "model; give --set metrics.clip_text=PATH, or =null to do without"
            )
        return run_padded(
            lambda ids: self.module(ids).text_embeds,
            self._ids(tokens),
            batch_size,
            self.device,
            self._precision,
        )

    def _ids(self, tokens: NDArray[np.uint16]) -> NDArray[np.int64]:
        ids = tokens.astype(np.int64)
        return ids if self._rows is None else self._rows[ids]

    def _hidden(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.module(ids).last_hidden_state
        return hidden if self.prefix is None else self.prefix(hidden)


def clip_text_bytes(name: str, prefix: str | None = None) -> int:
    """Return the bytes of a `ClipText` of the same arguments, without loading its tower.

    Raises:
        CheckpointError: If its configuration or the prefix cannot be read.
    """
    tower = pretrained_bytes(_module_class(name), name)
    return tower + (module_bytes(_load_prefix(prefix)) if prefix else 0)


def _module_class(name: str) -> Any:
    """Return the class of transformers that a text tower is loaded as."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    is_plain = _architecture(name) == "CLIPTextModel"
    return CLIPTextModel if is_plain else CLIPTextModelWithProjection


def _architecture(name: str) -> str | None:
    """Return the class that a model's configuration names, if it is on this machine.

    Where it is not yet, as before a first download, a whole CLIP model is assumed.
    """
    path = Path(resolve_weights(name))
    file: Any = path / _CONFIG_NAME
    if not path.is_dir() and name.count("/") in (1, 2):
        from huggingface_hub import try_to_load_from_cache

        owner, repository, *subfolder = name.split("/")
        file = try_to_load_from_cache(f"{owner}/{repository}", "/".join([*subfolder, _CONFIG_NAME]))
    if not isinstance(file, str | Path) or not Path(file).is_file():
        return None
    named = parse_json(Path(file).read_bytes(), str(file), error=CheckpointError)
    return next(iter(named.get("architectures") or ()), None)


def _compact_rows(path: Path) -> NDArray[np.int64] | None:
    if not path.is_file():
        return None
    rows = np.zeros(_NUM_CLIP_IDS, dtype=np.int64)
    for row, clip_id in enumerate(json.loads(path.read_text())):
        if row:
            rows[clip_id] = row
    return rows


def _load_prefix(name: str) -> Any:
    """Load UniDiffuser's text prefix, the only part of its caption decoder that is needed."""
    from d2i.models.weights.load import read_state_dict
    from d2i.models.weights.source import checked_prefix

    weight, bias = checked_prefix(read_state_dict(resolve_weights(name)), name).values()
    prefix = nn.Linear(weight.shape[1], weight.shape[0])
    prefix.load_state_dict({"weight": weight.float(), "bias": bias.float()})
    return freeze(prefix)


def load_clip_text(
    config: EncodersConfig, device: str = "cpu", precision: Precision = "fp32"
) -> ClipText:
    """Load the CLIP text encoder of a recipe.

    Raises:
        CheckpointError: If it cannot be loaded.
        ConfigError: If the recipe has none.
    """
    if config.clip_text is None:
        raise ConfigError(
            "encoders.clip_text is null, but text is to be encoded by it; expected a CLIP text "
            "encoder; give --set encoders.clip_text=PATH"
        )
    return ClipText(config.clip_text, config.text_prefix, device, precision)
