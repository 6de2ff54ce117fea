"""The CLIP text encoder: token ids to text latents, and to embeddings in CLIP image's space."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from d2i.config import Precision
from d2i.encoders.pretrained import freeze, load_pretrained, run_padded, weights_hash
from d2i.tokenize import WINDOW_LENGTH
from d2i.weights_resolve import resolve_weights

_NUM_CLIP_IDS = 49408


class ClipText:
    """A frozen CLIP text tower, run on 77-token windows without an attention mask.

    No mask is ever passed: the published pipelines pass none, and one would change the padded
    positions (docs/models.md, Text and CLIP).

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
        from transformers import CLIPTextModelWithProjection

        self.device, self._precision = device, precision
        self.module = load_pretrained(CLIPTextModelWithProjection, name).to(device)
        self.prefix = _load_prefix(prefix).to(device) if prefix else None
        self.dim: int = self.prefix.out_features if self.prefix else self.module.config.hidden_size
        self._rows = _compact_rows(Path(resolve_weights(name)) / "clip_ids.json")
        self.hash = weights_hash(nn.ModuleList([self.module, *filter(None, [self.prefix])]))

    @torch.inference_mode()
    def encode(self, tokens: NDArray[np.uint16], batch_size: int) -> NDArray[np.float32]:
        """Encode uint16 (N, 77 W) to the last hidden state, float32 (N, 77 W, text_dim)."""
        windows = self._ids(tokens).reshape(-1, WINDOW_LENGTH)  # (N W, 77)
        hidden = run_padded(self._hidden, windows, batch_size, self.device, self._precision)
        return hidden.reshape(len(tokens), -1, hidden.shape[-1])

    @torch.inference_mode()
    def embed(self, tokens: NDArray[np.uint16], batch_size: int) -> NDArray[np.float32]:
        """Embed uint16 (N, 77) in the space of the CLIP image tower: float32 (N, clip_dim)."""
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
