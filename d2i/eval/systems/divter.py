"""Divter: one model writes the caption of a dialog's image, another generates the image from it.

After Sun et al. 2022 (arXiv 2110.08515, section 4.1), whose captions come from DialoGPT; here any
causal language model of transformers can be used. Its text is the dialog, a marker, then the
caption.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2i.config import TextConfig
from d2i.dialog import Turn
from d2i.encoders.pretrained import load_pretrained, weights_hash
from d2i.errors import CheckpointError, ConfigError, DataError
from d2i.eval.prompts import Prompt
from d2i.eval.system import CallOptions, Generation, SystemContext, generate_with
from d2i.eval.systems import build_system
from d2i.prompt_text import context_text
from d2i.shards import ShardReader

_MARK = "\nDescription:"
_MAX_CONTEXT_TOKENS = 256
_MAX_DESCRIPTION_TOKENS = 48
_IGNORED = -100
# PhotoChat names the people in the image, which no dialog reveals: Divter leaves these out.
_NAMES_SOMEBODY = re.compile(r"^The photo has your ")


def build(context: SystemContext) -> DivterSystem:
    """Load the caption generator and the system that generates images."""
    return DivterSystem(context)


class DivterSystem:
    """Generates a caption for each dialog, and passes it on as the whole prompt."""

    def __init__(self, context: SystemContext) -> None:
        inner = context.spec.inner
        if inner is None:
            raise ConfigError(f"{context.spec.name}: expected divter:DIR,SYSTEM")
        self._captioner = DivterCaptioner(context.spec.target, context.device)
        self._inner = build_system(dataclasses.replace(context, spec=inner))
        self._name, self._sample = inner.name, context.recipe.sample
        self.described = {"describer": self._captioner.hash, **self._inner.described}

    def generate(self, prompts: Sequence[Prompt]) -> list[Generation]:
        """Generate images from the captions of the dialogs."""
        return self._inner.generate([self._described(prompt) for prompt in prompts])

    def generate_seeded(self, prompts: Sequence[Prompt], options: CallOptions) -> list[Generation]:
        """Generate as `generate` does, with the options of this call, if the inner system can."""
        captions = [self._described(prompt) for prompt in prompts]
        return generate_with(self._inner, self._name, self._sample, captions, options)

    def _described(self, prompt: Prompt) -> Prompt:
        text = self._captioner.describe(prompt.text)
        return Prompt(prompt.key, (Turn(None, text),), text)


@dataclass(frozen=True)
class DivterCaptionerConfig:
    """Training settings of a describer: our defaults, because Divter's are for other data."""

    num_steps: int = 1000
    batch_size: int = 16
    lr: float = 5e-5
    seed: int = 0


class DivterCaptioner:
    """Writes the caption of a dialog's image, one dialog at a time, so that others change nothing.

    Args:
        name: A directory written by `train_divter_captioner` or `save_pretrained`, or a hub
            repository.
        device: Torch device that it runs on.

    Raises:
        CheckpointError: If no causal language model or tokenizer can be loaded from there.
    """

    def __init__(self, name: str, device: str = "cpu") -> None:
        self._module, self._tokenizer = _load(name, device)
        self._device = device
        self.hash = weights_hash(self._module)

    @torch.inference_mode()
    def describe(self, text: str) -> str:
        """Return a caption of one line by greedy decoding, without sampling. May be empty."""
        ids = _context_ids(self._tokenizer, text)
        given = torch.tensor([ids], device=self._device)
        made = self._module.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=_MAX_DESCRIPTION_TOKENS,
            do_sample=False,
            num_beams=1,
            pad_token_id=self._tokenizer.eos_token_id,
            eos_token_id=self._tokenizer.eos_token_id,
        )
        words = self._tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)
        return " ".join(words.split())


def read_pairs(data_url: str, config: TextConfig) -> list[tuple[str, str]]:
    """Read (dialog, description) of every sample that has a description, in data set order.

    Descriptions that name the people in the image are left out.

    Raises:
        DataError: If there is none.
    """
    reader = ShardReader(data_url)
    pairs = []
    for sample in map(reader.read_json, range(len(reader))):
        description = sample.get("description") or ""
        if description and not _NAMES_SOMEBODY.match(description):
            turns = [Turn(turn["speaker"], turn["text"]) for turn in sample["context"]]
            pairs.append((context_text(turns, config), description))
    if not pairs:
        raise DataError(
            f"{data_url} has no captions to train on; expected PhotoChat's descriptions, or "
            "captions from 'd2i corpus --describe'; pass those to d2i preprocess with "
            "--set corpus.descriptions=FILE"
        )
    return pairs


def train_divter_captioner(
    pairs: Sequence[tuple[str, str]],
    base: str,
    out: Path,
    config: DivterCaptionerConfig,
    on_step: Callable[[int, float], None],
) -> None:
    """Fine-tune `base` on pairs and publish it atomically to `out`.

    The loss is over the caption only. Deterministic for one device and version.

    Raises:
        CheckpointError: If `base` cannot be loaded.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module, tokenizer = _load(base, device)
    module.train().requires_grad_(True)
    torch.manual_seed(config.seed)
    optimizer = torch.optim.AdamW(module.parameters(), lr=config.lr)
    rows = [_row(tokenizer, *pair) for pair in pairs]
    order = np.random.default_rng(config.seed)
    for step in range(1, config.num_steps + 1):
        chosen = order.choice(len(rows), min(config.batch_size, len(rows)), replace=False)
        batch = _batch([rows[i] for i in chosen], tokenizer.eos_token_id, device)
        loss = module(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        on_step(step, loss.item())
    _save(module.eval(), tokenizer, out)


def _load(name: str, device: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module = load_pretrained(AutoModelForCausalLM, name).to(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as err:
        reason = str(err).strip().splitlines()[0][:200]
        raise CheckpointError(
            f"{name}: cannot load its tokenizer: {reason}; expected the tokenizer's files in the "
            "model's directory; save it there with save_pretrained"
        ) from err
    if tokenizer.eos_token_id is None:
        raise CheckpointError(
            f"{name}: its tokenizer has no end-of-sequence token; expected the tokenizer of a "
            "causal language model"
        )
    return module, tokenizer


def _context_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenize the end of a dialog, and the marker that the caption follows."""
    dialog: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    mark: list[int] = tokenizer(_MARK, add_special_tokens=False)["input_ids"]
    return dialog[-_MAX_CONTEXT_TOKENS:] + mark


def _row(tokenizer: Any, text: str, description: str) -> tuple[list[int], list[int]]:
    """Return the token ids of one pair, and its labels: the loss ignores the dialog."""
    context = _context_ids(tokenizer, text)
    caption = tokenizer(f" {description}", add_special_tokens=False)["input_ids"]
    caption = [*caption[: _MAX_DESCRIPTION_TOKENS - 1], tokenizer.eos_token_id]
    return context + caption, [_IGNORED] * len(context) + caption


def _batch(
    rows: Sequence[tuple[list[int], list[int]]], pad_id: int, device: str
) -> dict[str, Tensor]:
    """Pad rows on the right, which a causal model does not attend to."""
    longest = max(len(ids) for ids, _ in rows)

    def padded(parts: Sequence[list[int]], value: int) -> Tensor:
        filled = [part + [value] * (longest - len(part)) for part in parts]
        return torch.tensor(filled, device=device)

    return {
        "input_ids": padded([ids for ids, _ in rows], pad_id),
        "labels": padded([labels for _, labels in rows], _IGNORED),
        "attention_mask": padded([[1] * len(ids) for ids, _ in rows], 0),
    }


def _save(module: Any, tokenizer: Any, out: Path) -> None:
    beside = out.with_name(f".{out.name}.d2i-tmp")
    shutil.rmtree(beside, ignore_errors=True)
    # With accelerate installed, transformers imports DeepSpeed here, which prints to stdout.
    with contextlib.redirect_stdout(sys.stderr):
        module.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    beside.replace(out)
