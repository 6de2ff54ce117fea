"""The text encoder's prompt of a context: its turns selected, linearized, tokenized and windowed.

Or, for language models with a chat template, its turns as messages.

Combines `d2i.dialog` and `d2i.tokenize` according to a recipe, for every stage that reads a
conversation. Must not import torch.
"""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from d2i.config import TextConfig
from d2i.dialog import NO_SPEAKER, Turn, is_written, linearize
from d2i.errors import DataError
from d2i.tokenize import WINDOW_LENGTH, encode, window

Role = Literal["user", "assistant"]
"""The role of a message: `assistant` for the speaker who shares the image, else `user`."""


def context_text(turns: Sequence[Turn], config: TextConfig) -> str:
    """Linearize a context to one line, oldest turn first.

    Drops whole turns on the side that `config.keep` does not keep: those over `max_turns`, and,
    with `cut="turn"`, those that do not fit the window. One turn always stays.
    """
    return _line(_kept_turns(turns, config), config)


def with_omitted(cut: str, turns: Sequence[Turn], config: TextConfig) -> str:
    """Join what a window cuts off a context's text and the turns that `context_text` drops.

    Args:
        cut: What the window cuts off; empty for nothing.
        turns: The whole context.
        config: The settings of text.

    Returns:
        Both in the order of the context; empty if the text is all of it.
    """
    num_kept = len(_kept_turns(turns, config))
    keeps_end = config.keep == "end"
    dropped = turns[: len(turns) - num_kept] if keeps_end else turns[num_kept:]
    parts = [_line(dropped, config), cut]
    return " ".join(filter(None, parts if keeps_end else reversed(parts)))


def _kept_turns(turns: Sequence[Turn], config: TextConfig) -> Sequence[Turn]:
    """Return the turns that `context_text` writes: one end of the context."""
    counted = [index for index, turn in enumerate(turns) if is_written(turn, config.empty_turns)]
    if not counted:
        return ()

    def kept(num_turns: int) -> Sequence[Turn]:
        if config.keep == "end":
            return turns[counted[-num_turns] :]
        return turns[: counted[num_turns - 1] + 1]

    def num_tokens(num_turns: int) -> int:
        return len(encode(_line(kept(num_turns), config)))

    num_turns = min(len(counted), config.max_turns or len(counted))
    if config.cut == "turn":
        room = (WINDOW_LENGTH - 2) * config.num_windows
        fitting = bisect.bisect_right(range(1, num_turns + 1), room, key=num_tokens)
        num_turns = max(1, fitting)
    return kept(num_turns)


def _line(turns: Sequence[Turn], config: TextConfig) -> str:
    return linearize(
        turns, config.strategy, empty_turns=config.empty_turns, speaker_runs=config.speaker_runs
    )


def text_tokens(text: str, config: TextConfig) -> npt.NDArray[np.uint16]:
    """Tokenize a line and cut it to the windows of a recipe: uint16 (77 W,)."""
    return window(encode(text), keep=config.keep, num_windows=config.num_windows)


def context_tokens(turns: Sequence[Turn], config: TextConfig) -> npt.NDArray[np.uint16]:
    """Linearize and tokenize a context: uint16 (77 W,)."""
    return text_tokens(context_text(turns, config), config)


@dataclass(frozen=True)
class Message:
    """One message of a chat, for language models with a chat template."""

    role: Role
    text: str


def context_roles(sample: Mapping[str, Any]) -> list[Role]:
    """Return the role of each turn of a sample's context.

    The speaker who shares the image is that of the image's own turn, the last one of the context.
    Their turns are `assistant`, all others `user`: those of an unnamed speaker too, as it is not
    known who wrote them, but for the image's own turn.

    Args:
        sample: The `json` member of a shard.

    Raises:
        DataError: If the context follows the image, or names speakers without the image's own turn.
    """
    context, key = sample["context"], sample["key"]
    if sample["direction"] != "answer":
        raise DataError(
            f"sample {key}: text.format=chat: its context follows the image; expected one that "
            "precedes it; prepare the data with --set corpus.direction=answer"
        )
    speakers = [turn["speaker"] for turn in context]
    if len(context) == sample["turn"] + 1:
        return turn_roles(speakers, len(context) - 1)
    if any(speaker not in (None, NO_SPEAKER) for speaker in speakers):
        raise DataError(
            f"sample {key}: text.format=chat: its context lacks the image's own turn, so it is not "
            "known which of its speakers shares the image; expected that turn; prepare the data "
            "with --set corpus.own_turn=include"
        )
    return turn_roles(speakers, None)


def turn_roles(speakers: Sequence[int | None], own_turn: int | None) -> list[Role]:
    """Return the role of each turn, from the speakers; see `context_roles`.

    Args:
        speakers: The speaker of each turn.
        own_turn: Index of the turn that shares the image; None if it is not known.
    """
    sharer = None if own_turn is None else speakers[own_turn]
    return [
        "assistant"
        if index == own_turn or (speaker == sharer and speaker not in (None, NO_SPEAKER))
        else "user"
        for index, speaker in enumerate(speakers)
    ]


def context_messages(
    turns: Sequence[Turn], roles: Sequence[Role], config: TextConfig
) -> tuple[Message, ...]:
    """Return the messages of a context, oldest first, not truncated to any window.

    `empty_turns`, `speaker_runs` and `max_turns` select and join turns as for a line; turns of an
    unnamed speaker are never joined.

    Args:
        turns: The context.
        roles: The role of each turn.
        config: The settings of text.
    """
    written = [
        (turn.speaker, role, turn.text.strip())
        for turn, role in zip(turns, roles, strict=True)
        if is_written(turn, config.empty_turns)
    ]
    if config.max_turns is not None:
        n = config.max_turns
        written = written[-n:] if config.keep == "end" else written[:n]
    messages: list[Message] = []
    last: int | None = None
    for speaker, role, text in written:
        if config.speaker_runs == "merge" and speaker is not None and speaker == last:
            joined = " ".join(filter(None, (messages[-1].text, text)))
            messages[-1] = Message(role, joined)
        else:
            messages.append(Message(role, text))
        last = speaker
    return tuple(messages)
