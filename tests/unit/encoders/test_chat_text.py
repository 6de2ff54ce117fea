"""Chats in a language model's template: roles, truncation, and messages that spell its tokens."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2i.config import TextConfig
from d2i.encoders.chat_text import ChatText
from d2i.errors import ConfigError
from d2i.prompt_text import Message
from tests.integration.pipelines import tiny_chat_tokenizer

# As Qwen3's, it writes a thought into a last message of the assistant, cuts what a message of the
# assistant calls a thought, and a thought that is over into the generation prompt.
THINKING = (
    "{% set ns = namespace(last=messages|length - 1) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
OPTIONS = {"enable_thinking": False}
LONG = 160
TOKENIZER: Any = tiny_chat_tokenizer(THINKING, "<think>", "</think>")
MESSAGES = (Message("user", "hi"), Message("assistant", "see this"), Message("user", "what?"))


def chat_text(num_tokens: int = LONG, **values: Any) -> ChatText:
    config = TextConfig.model_validate({"format": "chat", "cut": "turn"} | values)
    return ChatText(SimpleNamespace(tokenizer=TOKENIZER), OPTIONS, config, num_tokens)


def applied(*messages: Message) -> str:
    listed = [{"role": m.role, "content": m.text} for m in messages]
    text: str = TOKENIZER.apply_chat_template(
        listed, tokenize=False, add_generation_prompt=True, **OPTIONS
    )
    return text


def ids(text: str) -> list[int]:
    found: list[int] = TOKENIZER(text).input_ids
    return found


def special_ids(text: str) -> list[int]:
    added = TOKENIZER.added_tokens_decoder.keys()
    return [token for token in ids(text) if token in added]


def message_texts(text: str) -> list[str]:
    """Return the messages of a written chat."""
    parts = text.split("<|im_start|>")[1:-1]
    return [part.partition("\n")[2].removesuffix("<|im_end|>\n") for part in parts]


def test_chat_is_that_of_the_template() -> None:
    assert chat_text().write(MESSAGES) == applied(*MESSAGES)
    assert chat_text().write(MESSAGES[:1]) == applied(MESSAGES[0])
    assert chat_text().write([]) == applied(Message("user", ""))


def test_last_message_of_assistant_is_written_like_others() -> None:
    text = chat_text().write(MESSAGES[:2])
    assert "<think>" in applied(*MESSAGES[:2]).rpartition("<|im_start|>")[0]
    assert "<think>" not in text.rpartition("<|im_start|>")[0]
    assert text.startswith(applied(MESSAGES[0]).partition("<|im_start|>assistant")[0])


def test_permuted_roles_are_keyed_and_keep_the_tokens() -> None:
    many = [*MESSAGES, *MESSAGES[:1], *MESSAGES]
    spoken, permuted = chat_text(999), chat_text(999, roles="permuted")
    written = {key: permuted.write(many, key) for key in map(str, range(40))}
    assert written == {key: chat_text(999, roles="permuted").write(many, key) for key in written}
    assert len(set(written.values())) > 10
    for text in written.values():
        assert message_texts(text) == [m.text for m in many]
        assert Counter(ids(text)) == Counter(ids(spoken.write(many)))
    # Of each message, the share of the assistant is that of the whole chat: 2 of 7.
    first = [text.startswith("<|im_start|>assistant") for text in written.values()]
    assert 4 <= sum(first) <= 20


words = st.sampled_from(["a", "bc", "dée", "<|im_end|>", "</think>", "<|IM_START|>", "x" * 30])
texts = st.lists(words, min_size=1, max_size=12).map(" ".join) | st.text(max_size=40)
chats = st.lists(st.builds(Message, st.sampled_from(["user", "assistant"]), texts), max_size=9)


@given(chats, st.sampled_from(["end", "start"]), st.sampled_from(["turn", "token"]))
@settings(max_examples=150, deadline=None)
def test_chat_fits_and_keeps_most_of_one_side(messages: list[Message], keep: str, cut: str) -> None:
    room = 120
    whole = message_texts(chat_text(10**6, keep=keep).write(messages))
    text = chat_text(room, keep=keep, cut=cut).write(messages)
    kept = message_texts(text)
    assert len(ids(text)) <= room
    if not messages:
        assert kept == [""]
        return
    side = slice(len(whole) - len(kept), None) if keep == "end" else slice(len(kept))
    part, *others = kept if keep == "end" else kept[::-1]
    full, *wholes = whole[side] if keep == "end" else whole[side][::-1]
    assert others == wholes
    assert full.endswith(part) if keep == "end" else full.startswith(part)
    if cut == "turn" and len(kept) > 1:
        assert part == full
    if len(kept) < len(whole) and cut == "turn" and part == full:
        one_more = messages[-len(kept) - 1 :] if keep == "end" else messages[: len(kept) + 1]
        longer = chat_text(10**6, keep=keep).write(one_more)
        assert len(ids(longer)) > room


@given(chats)
@settings(max_examples=150, deadline=None)
def test_message_makes_no_special_token(messages: list[Message]) -> None:
    text = chat_text(10**6).write(messages)
    plain = chat_text(10**6).write([Message(m.role, "a") for m in messages])
    assert special_ids(text) == special_ids(plain)
    assert len(message_texts(text)) == max(len(messages), 1)


@given(chats, st.sampled_from(["end", "start"]))
@settings(max_examples=60, deadline=None)
def test_newest_message_and_its_role_always_change_the_tokens(
    messages: list[Message], keep: str
) -> None:
    if keep == "start":
        messages = messages[:1]
    older = messages if keep == "end" else [Message(m.role, "a") for m in messages]
    chat = chat_text(100, keep=keep)
    found = {
        chat.write([*older, newest])
        for newest in (Message("user", "a"), Message("user", "b"), Message("assistant", "a"))
    }
    assert len({tuple(ids(text)) for text in found}) == 3


def test_text_is_read_as_it_is() -> None:
    text = "  Don\u2019t LOOK "
    assert message_texts(chat_text().write([Message("user", text)])) == [text]


@pytest.mark.parametrize(
    "template",
    [
        None,
        "You are a model. {% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}",
        "{% if messages|length > 1 and messages[0].role == messages[2].role %}"
        "{{ raise_exception('alternate') }}{% endif %}{{ messages[0].content }}",
        "no message",
    ],
)
def test_template_that_does_not_write_one_message_after_another_is_refused(
    template: str | None,
) -> None:
    pipeline = SimpleNamespace(tokenizer=tiny_chat_tokenizer(template))
    with pytest.raises(ConfigError, match="chat template") as caught:
        ChatText(pipeline, {}, TextConfig(), LONG)
    assert "\n" not in str(caught.value)
