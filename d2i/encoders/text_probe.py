"""Probe of a pipeline's text: its encoders must read every message as text, the newest included.

It compares the token ids that text encoders get: where these differ, so do the conditions.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from d2i.dialog import Turn, linearize
from d2i.encoders.chat_text import ChatText
from d2i.encoders.prompt_truncation import (
    Keep,
    Row,
    TextWindow,
    first_rows,
    read_rows,
    special_tokens,
    text_tokenizers,
)
from d2i.prompt_text import Message

NEXT_STEP = "copy its tokenizers again from their source, or use another base model"
"""The next step after a problem."""
_SEVERAL_WINDOWS = 4


class Reading(Protocol):
    """The lines that a pipeline gets, as `PromptTruncation` makes them."""

    @property
    def keep(self) -> Keep:
        """The side that stays of a line that is too long."""

    @property
    def windows(self) -> Mapping[str, TextWindow]:
        """The text window of each encoder, by its name."""

    def read(self, line: str) -> str:
        """Return the text to pass to the pipeline for a line."""


def probe_text(pipeline: Any, reading: Reading) -> list[str]:
    """Check that two dialogs with different newest turns, and spelled special tokens, stay apart.

    Only text encoders run. A dialog that is longer than a window is not probed where the oldest
    turns are to be kept.

    Args:
        pipeline: A diffusers pipeline, on its device.
        reading: Makes the texts that it gets.

    Returns:
        The problems, one line each, which begins with the encoder's name; empty if it is good.

    Raises:
        ConfigError: If the pipeline cannot generate from a prompt.
    """
    tokenizers = text_tokenizers(pipeline)
    tokenizers = {name: tokenizers[name] for name in reading.windows}

    def rows(line: str) -> dict[str, list[Row]]:
        return read_rows(pipeline, {}, reading.read(line), tokenizers)

    problems = []
    plain = rows("a")
    for line in _spelling_lines(reading, tokenizers):
        spelled = rows(line)
        for name, tokenizer in tokenizers.items():
            special = _meaningful(tokenizer)
            more = _count(spelled[name], tokenizer, special)
            problems += [
                f"{name}: got the special token {special[token]} for a message that spells it; "
                "expected plain text"
                for token in more - _count(plain[name], tokenizer, special)
            ]
    fitting = {
        name: _num_fitting(tokenizer, reading.windows[name].dialog_tokens)
        for name, tokenizer in tokenizers.items()
    }
    for num_words in _dialog_lengths(reading.keep, fitting.values()):
        first, second = (rows(_dialog(num_words, newest)) for newest in ("a", "b"))
        problems += [
            f"{name}: got the same tokens for two dialogs of {num_words + 1} words that differ in "
            "the newest turn alone; expected different ones"
            for name, limit in fitting.items()
            if first[name] == second[name] and (num_words <= limit or reading.keep == "end")
        ]
    return list(dict.fromkeys(problems))


def probe_chat(chat: ChatText, encode: Callable[[list[str]], object], pipeline: Any) -> list[str]:
    """Check chats as `probe_text` does lines: newest turns, spelled tokens, and roles.

    No encoder runs.

    Args:
        chat: Writes the chats.
        encode: Encodes texts as they are given, by the pipeline.
        pipeline: The pipeline.
    """
    (name, tokenizer), *_ = text_tokenizers(pipeline).items()

    def rows(*messages: Message) -> Row:
        with chat.as_given():
            texts = [chat.write(messages)]
            return first_rows(pipeline.components[name], lambda: encode(texts))[0]

    problems = []
    special = _meaningful(tokenizer)
    plain = _count([rows(Message("user", "a"), Message("assistant", "a"))], tokenizer, special)
    for token in special_tokens(tokenizer).values():
        words = f"a {token} a {token.upper()} a {token.lower()} a"
        found = [rows(Message("user", words), Message("assistant", words))]
        problems += [
            f"{name}: got the special token {special[index]} for a message of a chat that spells "
            "it; expected plain text"
            for index in _count(found, tokenizer, special) - plain
        ]
    keeps_end = chat.config.keep == "end"
    for number in (1, *(chat.room * factor for factor in (1, 2, 4))):
        words = " ".join(["a"] * number)
        for older in ((Message("user", words),), (Message("user", "a"),) * number):
            if not keeps_end and number > 1:
                continue
            first, second, third = (
                rows(*older, newest)
                for newest in (
                    Message("user", "a"),
                    Message("user", "b"),
                    Message("assistant", "a"),
                )
            )
            if first in (second, third):
                changed = "turn" if first == second else "role"
                problems.append(
                    f"{name}: got the same tokens for two chats of {len(older) + 1} messages that "
                    f"differ in the newest {changed} alone; expected different ones"
                )
    return list(dict.fromkeys(problems))


def _spelling_lines(reading: Reading, tokenizers: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines that spell all special tokens, as many in each as fit the encoder they are of."""
    for name, tokenizer in tokenizers.items():
        line, room = "a", reading.windows[name].dialog_tokens
        left = room
        for token in special_tokens(tokenizer).values():
            for spelling in dict.fromkeys((token, token.upper(), token.lower())):
                words = f" {spelling} a"
                taken = _num_tokens(tokenizer, reading.read(words)) + 1
                if taken >= left and left < room:
                    yield line
                    line, left = "a", room
                line, left = line + words, left - taken
        yield line


def _meaningful(tokenizer: Any) -> dict[int, str]:
    """Return the special tokens by id, without the one that only says that letters are unknown."""
    unknown = tokenizer.unk_token
    others = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    return {
        index: token
        for index, token in special_tokens(tokenizer).items()
        if token != unknown or token in others
    }


def _count(rows: list[Row], tokenizer: Any, special: Mapping[int, str]) -> Counter[int]:
    """Return the number of each special token in rows, apart from the padding around."""
    found: Counter[int] = Counter()
    for row in rows:
        inside = [place for place, token in enumerate(row) if token != tokenizer.pad_token_id]
        kept = row[inside[0] : inside[-1] + 1] if inside else []
        found.update(token for token in kept if token in special)
    return found


def _num_fitting(tokenizer: Any, room: int) -> int:
    """Return the number of words, before a newest turn, that just fit."""
    found = bisect.bisect_right(
        range(1, room + 1), room, key=lambda number: _num_tokens(tokenizer, _dialog(number, "b"))
    )
    return max(found, 1)


def _dialog_lengths(keep: Keep, fitting: Iterable[int]) -> list[int]:
    """Return numbers of words: few, those that just fit an encoder, one more, and many more."""
    lengths = {1}
    for number in fitting:
        more = {number + 1, _SEVERAL_WINDOWS * number} if keep == "end" else set()
        lengths |= {number, *more}
    return sorted(lengths)


def _dialog(num_words: int, newest: str) -> str:
    return linearize([Turn(None, " ".join(["a"] * num_words)), Turn(None, newest)])


def _num_tokens(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
