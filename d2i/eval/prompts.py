"""Prompts for systems: the context of an instance, whole or in part, as turns and as one line.

Must not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from d2i.config import TextConfig
from d2i.dialog import Turn, dialog_of_key, key_order_hash
from d2i.errors import ConfigError
from d2i.prompt_text import Message, context_messages, context_roles, context_text
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
        messages: The same as the messages of a chat, if the recipe says so, not truncated either.
    """

    key: str
    turns: tuple[Turn, ...]
    text: str
    messages: tuple[Message, ...] = ()


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
            DataError: If a chat cannot be made of it; see `context_roles`.
        """
        sample = self._shown(index)
        turns = _turns(sample)
        roles = context_roles(sample) if sample and self._config.format == "chat" else []
        if self._mode == "last":
            last = [place for place, turn in enumerate(turns) if turn.text.strip()][-1:]
            turns, roles = (
                [turns[place] for place in last],
                [roles[place] for place in last if roles],
            )
        messages = context_messages(turns, roles, self._config) if roles else ()
        text = context_text(turns, self._config)
        return Prompt(self._reader.keys[index], tuple(turns), text, messages)

    def read_dialog(self, index: int) -> str:
        """Read the whole context of instance `index` as one line, whatever the mode."""
        return context_text(_turns(self._reader.read_json(index)), self._config)

    def _shown(self, index: int) -> Mapping[str, Any]:
        """Return the sample whose context is shown; empty for none."""
        if self._mode == "none":
            return {}
        if self._mode == "shuffled":
            index = self._derangement[index]
        return self._reader.read_json(index)

    @cached_property
    def _derangement(self) -> list[int]:
        return derangement(list(self._reader.keys))


def _turns(sample: Mapping[str, Any]) -> list[Turn]:
    return [Turn(turn["speaker"], turn["text"]) for turn in sample.get("context", ())]


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
