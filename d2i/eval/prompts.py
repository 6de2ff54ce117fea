"""Prompts for systems: the context of an instance, whole or in part, as turns and as one line.

Must not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from d2i.config import TextConfig
from d2i.dialog import Turn, dialog_of_key, key_order_hash
from d2i.errors import ConfigError
from d2i.prompt_text import context_text
from d2i.shards import ShardReader

ContextMode = Literal["full", "last", "none", "shuffled"]
"""The whole context, its last turn that has text, nothing, or another dialog's context."""


@dataclass(frozen=True)
class Prompt:
    """The prompt of one instance.

    Args:
        key: The instance's key; of the prompt, it alone keys the noise.
        turns: The turns that the system may read, oldest first.
        text: The same as one line, linearized by the recipe, not truncated to any window.
    """

    key: str
    turns: tuple[Turn, ...]
    text: str


class PromptReader:
    """Reads prompts from a data set.

    Args:
        reader: The data set.
        config: Settings that linearize a context.
        mode: The part of the context that a system may read.
    """

    def __init__(self, reader: ShardReader, config: TextConfig, mode: ContextMode) -> None:
        self._reader, self._config, self._mode = reader, config, mode

    def read(self, index: int) -> Prompt:
        """Read the prompt of instance `index`.

        Raises:
            ConfigError: With `shuffled`, if there is no other dialog.
        """
        turns = self._shown(index)
        return Prompt(self._reader.keys[index], turns, context_text(turns, self._config))

    def read_dialog(self, index: int) -> str:
        """Read the whole context of instance `index` as one line, whatever the mode."""
        return context_text(self._turns(index), self._config)

    def _shown(self, index: int) -> tuple[Turn, ...]:
        if self._mode == "none":
            return ()
        if self._mode == "shuffled":
            return self._turns(self._derangement[index])
        turns = self._turns(index)
        if self._mode == "last":
            return tuple([turn for turn in turns if turn.text.strip()][-1:])
        return turns

    def _turns(self, index: int) -> tuple[Turn, ...]:
        return tuple(
            Turn(t["speaker"], t["text"]) for t in self._reader.read_json(index)["context"]
        )

    @cached_property
    def _derangement(self) -> list[int]:
        return derangement(list(self._reader.keys))


def derangement(keys: list[str]) -> list[int]:
    """Assign to each instance one of another dialog: the next in the seeded order of keys.

    Raises:
        ConfigError: If all instances are of one dialog.
    """
    dialogs = [dialog_of_key(key) for key in keys]
    if len(set(dialogs)) < 2:
        raise ConfigError(
            f"--context shuffled: the data set has {len(set(dialogs))} dialog; expected at least "
            "two, to swap contexts between them; prepare more of the corpus"
        )
    order = sorted(range(len(keys)), key=lambda index: key_order_hash(keys[index], 0))
    found = [0] * len(keys)
    # Walk the order backwards, twice around, to know the next other dialog at each position.
    following: int | None = None
    for place in range(2 * len(order) - 1, -1, -1):
        index, after = order[place % len(order)], order[(place + 1) % len(order)]
        following = after if dialogs[after] != dialogs[index] else following
        if following is not None:
            found[index] = following
    return found
