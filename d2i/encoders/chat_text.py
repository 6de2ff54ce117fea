"""Chats for pipelines: the messages of a dialog in the chat template of a language model.

A pipeline writes its whole prompt as one user message. Here each turn is a message of its own, so
that the template says who speaks, and the pipeline's own code encodes what was written.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, get_args

import numpy as np

from d2i.config import TextConfig
from d2i.diffusion.draws import uniform
from d2i.encoders.prompt_truncation import cut_line, spelling_pattern
from d2i.errors import ConfigError
from d2i.prompt_text import Message, Role

_PURPOSE = "text.roles"
# Private-use characters, which no template contains.
_MARKS = ("\ue000", "\ue001")
_AS_GIVEN = "{{ messages[0].content }}"


class ChatText:
    """Writes chats as the text that a pipeline's language model reads, truncated to its window.

    Each message is written by the template alone, and the last one with the generation prompt, so
    that messages of one role all look the same: some templates treat the last message differently.
    A chat that is too long loses whole messages on the side that `text.keep` gives up; then, with
    `text.cut=token` or where one message alone is too long, words of the outermost message. A token
    of the template that a message spells stays plain text.

    Args:
        pipeline: A diffusers pipeline with a tokenizer that has a chat template.
        options: The options with which the pipeline fills in the template.
        config: The settings of text.
        num_tokens: Tokens that the pipeline reads, those of the template included.
        seed: Of the permuted roles.

    Attributes:
        config: The settings of text.
        room: Tokens left for the text of a chat of one message.

    Raises:
        ConfigError: If there is no chat template, or it does not write messages one after another.
    """

    def __init__(
        self,
        pipeline: Any,
        options: Mapping[str, Any],
        config: TextConfig,
        num_tokens: int,
        seed: int = 0,
    ) -> None:
        self.config = config
        self._tokenizer, self._num_tokens, self._seed = pipeline.tokenizer, num_tokens, seed
        # Also those that are not special, such as a mark of reasoning.
        added = (str(token) for token in self._tokenizer.added_tokens_decoder.values())
        self._spelled = spelling_pattern(token for token in added if len(token) > 1)
        self._around = {role: self._parts(role) for role in get_args(Role)}
        before, after = self._parts("user", add_generation_prompt=True, **options)
        self._end = after.removeprefix(self._around["user"][1])
        self._check(before, after)
        self.room = num_tokens - self.num_tokens(self._written([]))

    def write(self, messages: Sequence[Message], key: str = "") -> str:
        """Return the text of a chat; no message at all is an empty message of the user.

        Args:
            messages: Oldest first.
            key: Key of the sample, which permutes the roles with `text.roles=permuted`.
        """
        kept = self._cut([replace(m, text=self._plain(m.text)) for m in messages])
        if self.config.roles == "permuted" and kept:
            draws = uniform(self._seed, _PURPOSE, [key], 0, (len(kept),))[0]
            roles = [kept[int(index)].role for index in np.argsort(draws, kind="stable")]
            kept = [replace(m, role=role) for m, role in zip(kept, roles, strict=True)]
        return self._written(kept)

    def write_and_cut(self, messages: Sequence[Message], key: str = "") -> tuple[str, str]:
        """Return the text of a chat as `write` does, and the text of its messages that is cut."""
        plain = [replace(m, text=self._plain(m.text)) for m in messages]
        whole, kept = (" ".join([m.text for m in part]) for part in (plain, self._cut(plain)))
        cut = whole.removesuffix(kept) if self.config.keep == "end" else whole.removeprefix(kept)
        return self.write(messages, key), cut.strip()

    @contextmanager
    def as_given(self) -> Iterator[None]:
        """Let the pipeline encode texts of `write` as they are, within the block."""
        template = self._tokenizer.chat_template
        self._tokenizer.chat_template = _AS_GIVEN
        try:
            yield
        finally:
            self._tokenizer.chat_template = template

    def num_tokens(self, text: str) -> int:
        """Return the number of tokens of a text of `write`."""
        return len(self._tokenizer(text, verbose=False).input_ids)

    def _plain(self, text: str) -> str:
        return self._spelled.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)

    def _written(self, messages: Sequence[Message]) -> str:
        around = self._around
        shown = messages or [Message("user", "")]
        return "".join([m.text.join(around[m.role]) for m in shown]) + self._end

    def _fits(self, messages: Sequence[Message]) -> bool:
        return self.num_tokens(self._written(messages)) <= self._num_tokens

    def _cut(self, messages: list[Message]) -> list[Message]:
        """Drop whole messages, and words of the outermost one, until the chat fits."""
        keeps_end = self.config.keep == "end"

        def kept(number: int) -> list[Message]:
            return messages[len(messages) - number :] if keeps_end else messages[:number]

        fitting = bisect.bisect_left(
            range(1, len(messages) + 1), True, key=lambda number: not self._fits(kept(number))
        )
        if fitting == len(messages) or (fitting and self.config.cut == "turn"):
            return kept(fitting)
        outermost = messages[-fitting - 1] if keeps_end else messages[fitting]

        def with_part(text: str) -> list[Message]:
            part = replace(outermost, text=text)
            return [part, *kept(fitting)] if keeps_end else [*kept(fitting), part]

        text = cut_line(outermost.text, lambda part: self._fits(with_part(part)), self.config.keep)
        return with_part(text) if text or not fitting else kept(fitting)

    def _parts(self, role: Role, **options: Any) -> tuple[str, str]:
        """Return what the template writes before and after the one message of a chat."""
        pieces = self._applied([Message(role, _MARKS[0])], **options).split(_MARKS[0])
        if len(pieces) != 2:
            raise self._refused()
        return pieces[0], pieces[1]

    def _check(self, before: str, after: str) -> None:
        """Check that a chat is its messages one after another, and then the generation prompt."""
        given, plain = (before, after), self._around["user"]
        chat = [Message("user", _MARKS[0]), Message("assistant", _MARKS[1])]
        chat.append(chat[0])
        expected = "".join([m.text.join(self._around[m.role]) for m in chat])
        if given != (plain[0], plain[1] + self._end) or self._applied(chat) != expected:
            raise self._refused()

    def _applied(self, messages: Sequence[Message], **options: Any) -> str:
        listed = [{"role": m.role, "content": m.text} for m in messages]
        try:
            text: str = self._tokenizer.apply_chat_template(listed, tokenize=False, **options)
        except Exception as err:  # Whatever a template of a stranger raises.
            raise self._refused() from err
        return text

    def _refused(self) -> ConfigError:
        return ConfigError(
            f"text.format=chat: the chat template of {type(self._tokenizer).__name__} is missing, "
            "or does not write messages one after another; expected that of Qwen3; copy the "
            "tokenizer again from its source, or use text.format=line"
        )
