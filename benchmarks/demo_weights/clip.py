"""The demo's CLIP pair: two small towers, trained contrastively and on attribute labels.

The text tower reads captions here, and dialogs later (`reading`). The labels (an auxiliary task,
named in the model card) make a few minutes of training enough. The text tower's last hidden state
conditions the backbone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from benchmarks.demo_weights.images import ImageBatch
from benchmarks.demo_weights.texts import Texts, labels, to_rows
from benchmarks.demo_weights.vae import learning_rate, save_whole
from d2i.demo.scene import ATTRIBUTES
from d2i.tokenize import END_ID, START_ID

_WIDTH = 64
_BATCH = 128
# OpenAI CLIP's pixel statistics, as in d2i's CLIP image encoder.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ClipPair:
    """Both towers and the compact vocabulary of the text tower."""

    text: Any
    image: Any
    clip_ids: list[int]

    def hidden(self, windows_NT: Tensor) -> Tensor:
        """Return the last hidden state of windows of true CLIP ids, without a mask: (N, 77, 64)."""
        rows = to_rows(windows_NT, self.clip_ids)
        state: Tensor = self.text(rows).last_hidden_state
        return state


class Readers(nn.Module):
    """Linear classifiers of the six attributes on a feature: the auxiliary task."""

    def __init__(self) -> None:
        """Build one classifier per attribute."""
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(_WIDTH, len(v)) for v in ATTRIBUTES.values())

    def loss(self, feature_BD: Tensor, labels_BA: Tensor) -> Tensor:
        """Return the mean cross entropy over the attributes."""
        losses = [
            functional.cross_entropy(head(feature_BD), labels_BA[:, index])
            for index, head in enumerate(self.heads)
        ]
        return torch.stack(losses).mean()

    def accuracy(self, feature_BD: Tensor, labels_BA: Tensor) -> list[float]:
        """Return the share read correctly, in the order of `ATTRIBUTES`."""
        return [
            float((head(feature_BD).argmax(1) == labels_BA[:, index]).float().mean())
            for index, head in enumerate(self.heads)
        ]


def build_clip(clip_ids: list[int]) -> ClipPair:
    """Build two untrained towers for a vocabulary."""
    sizes: dict[str, Any] = {
        "hidden_size": _WIDTH,
        "intermediate_size": 4 * _WIDTH,
        "num_attention_heads": 4,
    }
    end, start = clip_ids.index(END_ID), clip_ids.index(START_ID)
    text = CLIPTextConfig(
        vocab_size=len(clip_ids),
        num_hidden_layers=2,
        max_position_embeddings=77,
        projection_dim=_WIDTH,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
        **sizes,
    )
    image = CLIPVisionConfig(
        num_hidden_layers=2, image_size=64, patch_size=8, projection_dim=_WIDTH, **sizes
    )
    return ClipPair(
        CLIPTextModelWithProjection(text), CLIPVisionModelWithProjection(image), clip_ids
    )


def train_clip(
    pair: ClipPair, texts: Texts, images: ImageBatch, num_steps: int, seed: int
) -> Readers:
    """Train both towers in place; return the readers trained with them on the text."""
    generator = torch.Generator().manual_seed(seed)
    readers, image_readers = Readers(), Readers()
    log_scale = nn.Parameter(torch.tensor(2.3))
    modules = nn.ModuleList([pair.text, pair.image, readers, image_readers])
    parameters = [*modules.parameters(), log_scale]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: learning_rate(s, num_steps))
    rows_NT, labels_NA = to_rows(texts.windows_NT, pair.clip_ids), labels(texts.scenes)
    shown = _images_of(texts, images)
    for step in range(num_steps):
        chosen = torch.randint(len(texts.scenes), (_BATCH,), generator=generator)
        which = torch.randint(shown.shape[1], (_BATCH,), generator=generator)
        pixels = normalise(images.batch(shown[chosen, which]))
        loss = _pair_loss(
            pair, rows_NT[chosen], pixels, labels_NA[chosen], readers, image_readers, log_scale
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"clip step {step} of {num_steps}: loss {loss.item():.4f}", flush=True)
    modules.eval()
    return readers


def pooled_end(hidden_BTD: Tensor, rows_BT: Tensor, end_row: int) -> Tensor:
    """Return the state at the first end token: (B, D)."""
    first = (rows_BT == end_row).int().argmax(1)
    return hidden_BTD[torch.arange(len(first)), first]


def normalise(pixels_BCHW: Tensor) -> Tensor:
    """Normalise pixels in -1..1 for the image tower."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (_MEAN, _STD))
    return ((pixels_BCHW + 1) / 2 - mean) / std


def save_text(pair: ClipPair, directory: Path) -> None:
    """Write the text tower with its `clip_ids.json`, as float16 safetensors."""

    def save(scratch: Path) -> None:
        pair.text.half().save_pretrained(scratch)
        (scratch / "clip_ids.json").write_text(json.dumps(pair.clip_ids))

    save_whole(directory, save)
    pair.text.float()


def save_image(pair: ClipPair, directory: Path) -> None:
    """Write the image tower, as float16 safetensors."""
    save_whole(directory, pair.image.half().save_pretrained)
    pair.image.float()


def load_clip(text_directory: Path, image_directory: Path) -> ClipPair:
    """Load in float32 the towers that `save_text` and `save_image` wrote."""
    text = CLIPTextModelWithProjection.from_pretrained(text_directory, dtype=torch.float32)
    image = CLIPVisionModelWithProjection.from_pretrained(image_directory, dtype=torch.float32)
    clip_ids = json.loads((text_directory / "clip_ids.json").read_text())
    return ClipPair(text.eval(), image.eval(), clip_ids)


def _images_of(texts: Texts, images: ImageBatch) -> Tensor:
    """Return for each text the indices of its scene's renderings: int64 (N, jitters)."""
    by_scene: dict[object, list[int]] = {}
    for index, scene in enumerate(images.scenes):
        by_scene.setdefault(scene, []).append(index)
    return torch.tensor([by_scene[scene] for scene in texts.scenes])


def _pair_loss(
    pair: ClipPair,
    rows_BT: Tensor,
    pixels_BCHW: Tensor,
    labels_BA: Tensor,
    readers: Readers,
    image_readers: Readers,
    log_scale: Tensor,
) -> Tensor:
    """Return symmetric contrastive loss (same scene: no negative pair) plus both label losses."""
    text_output, shown = pair.text(rows_BT), pair.image(pixels_BCHW)
    text_BD = functional.normalize(text_output.text_embeds, dim=1)
    image_BD = functional.normalize(shown.image_embeds, dim=1)
    same = (labels_BA[:, None] == labels_BA[None]).all(2) & ~torch.eye(len(labels_BA)).bool()
    logits = (log_scale.exp().clamp(max=100) * text_BD @ image_BD.T).masked_fill(same, -1e4)
    target = torch.arange(len(logits))
    contrast = functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)
    end = pooled_end(text_output.last_hidden_state, rows_BT, pair.text.config.eos_token_id)
    named = readers.loss(end, labels_BA) + image_readers.loss(shown.image_embeds, labels_BA)
    return 0.5 * contrast + named
