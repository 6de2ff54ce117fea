"""Context text for the text encoder: the paper's strategies, and truncation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2i.config import TextConfig
from d2i.dialog import NO_SPEAKER, Turn, linearize
from d2i.errors import DataError
from d2i.prompt_text import (
    Message,
    context_messages,
    context_roles,
    context_text,
    context_tokens,
    turn_roles,
)
from d2i.tokenize import END_ID, START_ID, encode, window

WORDS = st.lists(st.sampled_from(["a", "tree", "by", "the", "sea", "", " "]), max_size=30)
TURNS = st.lists(
    st.builds(Turn, st.none() | st.integers(0, 2), WORDS.map(" ".join)), min_size=1, max_size=12
)


@pytest.mark.parametrize(
    ("strategy", "line"),
    [
        ("hash", "# Turn 1 # Turn 2"),
        ("space", "Turn 1 Turn 2"),
        ("special", "[PER1] Turn 1 [PER2] Turn 2"),
        ("letters", "A: Turn 1 B: Turn 2"),
    ],
)
def test_context_strategies_match_paper_figure_4(strategy: str, line: str) -> None:
    for speakers in [(None, None), (0, 1), (1, 0)]:
        turns = [Turn(speakers[0], "Turn 1"), Turn(speakers[1], "Turn 2")]
        assert context_text(turns, TextConfig(strategy=strategy)) == line


FIGURE_4 = [Turn(None, f"Turn {number}") for number in range(1, 31)]
"""The paper's Figure 4, continued until it is too long under every strategy."""
WINDOWS = {
    ("hash", "end"): (
        "turn 12 # turn 13 # turn 14 # turn 15 # turn 16 # turn 17 # turn 18 # turn 19 # "
        "turn 20 # turn 21 # turn 22 # turn 23 # turn 24 # turn 25 # turn 26 # turn 27 # "
        "turn 28 # turn 29 # turn 30"
    ),
    ("hash", "start"): (
        "# turn 1 # turn 2 # turn 3 # turn 4 # turn 5 # turn 6 # turn 7 # turn 8 # turn 9 "
        "# turn 10 # turn 11 # turn 12 # turn 13 # turn 14 # turn 15 # turn 16 # turn 17 "
        "# turn 18 # turn 19 # turn 20 # turn 21"
    ),
    ("space", "end"): (
        "turn 4 turn 5 turn 6 turn 7 turn 8 turn 9 turn 10 turn 11 turn 12 turn 13 turn "
        "14 turn 15 turn 16 turn 17 turn 18 turn 19 turn 20 turn 21 turn 22 turn 23 turn "
        "24 turn 25 turn 26 turn 27 turn 28 turn 29 turn 30"
    ),
    ("space", "start"): (
        "turn 1 turn 2 turn 3 turn 4 turn 5 turn 6 turn 7 turn 8 turn 9 turn 10 turn 11 "
        "turn 12 turn 13 turn 14 turn 15 turn 16 turn 17 turn 18 turn 19 turn 20 turn 21 "
        "turn 22 turn 23 turn 24 turn 25 turn 26 turn 27 turn 28"
    ),
    ("special", "end"): (
        "2] turn 20 [per 1] turn 21 [per 2] turn 22 [per 1] turn 23 [per 2] turn 24 [per "
        "1] turn 25 [per 2] turn 26 [per 1] turn 27 [per 2] turn 28 [per 1] turn 29 [per "
        "2] turn 30"
    ),
    ("special", "start"): (
        "[per 1] turn 1 [per 2] turn 2 [per 1] turn 3 [per 2] turn 4 [per 1] turn 5 [per "
        "2] turn 6 [per 1] turn 7 [per 2] turn 8 [per 1] turn 9 [per 2] turn 10 [per 1] "
        "turn 11 [per 2] turn 12"
    ),
    ("letters", "end"): (
        "b: turn 16 a: turn 17 b: turn 18 a: turn 19 b: turn 20 a: turn 21 b: turn 22 a: "
        "turn 23 b: turn 24 a: turn 25 b: turn 26 a: turn 27 b: turn 28 a: turn 29 b: "
        "turn 30"
    ),
    ("letters", "start"): (
        "a: turn 1 b: turn 2 a: turn 3 b: turn 4 a: turn 5 b: turn 6 a: turn 7 b: turn 8 "
        "a: turn 9 b: turn 10 a: turn 11 b: turn 12 a: turn 13 b: turn 14 a: turn 15 b: "
        "turn 16 a: turn 1"
    ),
}


@pytest.mark.parametrize(("strategy", "keep"), sorted(WINDOWS))
def test_window_keeps_start_or_end_of_paper_figure_4(strategy: str, keep: Any) -> None:
    """Truncated by token: the first mark or the last turn may be partial."""
    kept = encode(WINDOWS[strategy, keep])
    assert len(kept) == 75
    tokens = context_tokens(FIGURE_4, TextConfig(strategy=strategy, keep=keep))
    assert tokens.tolist() == [START_ID, *kept, END_ID]


def test_empty_turns_keep_retains_marks_of_empty_turns() -> None:
    turns = [Turn(0, "a"), Turn(1, ""), Turn(0, "b")]
    for strategy, dropped, kept in [
        ("hash", "# a # b", "# a # # b"),
        ("space", "a b", "a b"),
        ("letters", "A: a A: b", "A: a B: A: b"),
    ]:
        assert linearize(turns, strategy) == dropped
        assert linearize(turns, strategy, empty_turns="keep") == kept


def test_speaker_runs_merge_joins_turns_of_one_speaker() -> None:
    turns = [Turn(0, "a"), Turn(0, "b"), Turn(1, ""), Turn(1, "c"), Turn(0, "d")]
    assert linearize(turns, "letters") == "A: a A: b B: c A: d"
    assert linearize(turns, "letters", speaker_runs="merge") == "A: a b B: c A: d"
    assert linearize(turns, speaker_runs="merge") == "# a b # c # d"
    unnamed = [Turn(None, "a"), Turn(None, "b")]
    assert linearize(unnamed, speaker_runs="merge") == "# a # b"


@pytest.mark.parametrize(
    ("keep", "line"), [("end", "# c # d"), ("start", "# a # b")], ids=["end", "start"]
)
def test_turns_beyond_max_turns_are_dropped(keep: Any, line: str) -> None:
    turns = [Turn(None, text) for text in ["a", "", "b", "c", "", "d"]]
    assert context_text(turns, TextConfig(max_turns=2, keep=keep)) == line
    assert context_text(turns, TextConfig(max_turns=9, keep=keep)) == "# a # b # c # d"


def test_cut_turn_truncates_context_between_turns() -> None:
    turns = [Turn(None, " ".join([word] * 30)) for word in ["one", "two", "three"]]
    whole = context_text(turns, TextConfig())
    assert len(encode(whole)) == 93
    by_turn = TextConfig(cut="turn")
    assert context_text(turns, by_turn) == whole[whole.index("# two") :]
    assert context_text(turns, TextConfig(cut="turn", keep="start")).endswith("two")
    assert context_text(turns, TextConfig(cut="turn", num_windows=2)) == whole
    # A single turn that is too long is kept, and truncated by token.
    assert context_text([Turn(None, "word " * 200)], by_turn).count("word") == 200


@given(TURNS, st.sampled_from(["end", "start"]), st.integers(1, 2), st.none() | st.integers(1, 5))
def test_truncated_context_keeps_first_or_last_turns(
    turns: list[Turn], keep: Any, num_windows: int, max_turns: int | None
) -> None:
    config = TextConfig(keep=keep, cut="turn", num_windows=num_windows, max_turns=max_turns)
    spoken = [turn.text.strip() for turn in turns if turn.text.strip()]
    line = context_text(turns, config)
    marks = line.count("#")
    assert marks <= (max_turns or marks)
    kept = (spoken[len(spoken) - marks :] if keep == "end" else spoken[:marks]) if marks else []
    assert line == " ".join(f"# {text}" for text in kept)
    assert bool(kept) == bool(spoken)
    if marks > 1:
        assert len(encode(line)) <= 75 * num_windows
    tokens = context_tokens(turns, config)
    assert tokens.shape == (77 * num_windows,)
    assert np.array_equal(tokens, window(encode(line), keep, num_windows))
    assert set(tokens[tokens >= START_ID].tolist()) <= {START_ID, END_ID}


def sample_of(*turns: tuple[int | None, str], **values: Any) -> dict[str, Any]:
    context = [{"speaker": speaker, "text": text} for speaker, text in turns]
    of_image = {"key": "k", "direction": "answer", "turn": len(turns) - 1}
    return {"context": context, **of_image, **values}


def test_role_of_assistant_is_that_of_the_speaker_who_shares_the_image() -> None:
    named = sample_of((1, "hi"), (0, "hello"), (2, "who?"), (0, ""))
    assert context_roles(named) == ["user", "assistant", "user", "assistant"]
    # Nobody knows who wrote the turns of unnamed speakers, but for the image's own.
    assert context_roles(sample_of((None, "a"), (None, "b"), (None, "c"))) == [
        *("user", "user"),
        "assistant",
    ]
    assert context_roles(sample_of((None, "a"), (None, "b"), turn=2)) == ["user", "user"]
    assert context_roles(sample_of((NO_SPEAKER, "be kind"), (1, "a"), turn=1)) == [
        "user",
        "assistant",
    ]
    assert turn_roles([0, 1, NO_SPEAKER], 2) == ["user", "user", "assistant"]
    assert turn_roles([0, 1], None) == ["user", "user"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [({"turn": 2}, "corpus.own_turn=include"), ({"direction": "first"}, "direction=answer")],
)
def test_chat_whose_sharer_is_not_known_is_refused(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError, match=expected) as caught:
        context_roles(sample_of((0, "a"), (1, "b"), **values))
    assert "sample k: text.format=chat" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_messages_of_a_chat_follow_the_settings_of_turns() -> None:
    turns = [Turn(0, "a"), Turn(0, " b "), Turn(1, ""), Turn(0, "c"), Turn(NO_SPEAKER, "x")]
    turns += [Turn(None, "d"), Turn(None, "e"), Turn(1, "f")]
    roles = turn_roles([turn.speaker for turn in turns], 7)

    def messages(**values: Any) -> list[str]:
        found = context_messages(turns, roles, TextConfig.model_validate(values))
        return [f"{m.role[0]}:{m.text}" for m in found]

    assert messages() == ["u:a", "u:b", "u:c", "u:d", "u:e", "a:f"]
    assert messages(speaker_runs="merge") == ["u:a b c", "u:d", "u:e", "a:f"]
    assert messages(empty_turns="keep")[2:4] == ["a:", "u:c"]
    assert messages(max_turns=2) == ["u:e", "a:f"]
    assert messages(max_turns=2, keep="start") == ["u:a", "u:b"]
    assert context_messages([], [], TextConfig()) == ()
    assert context_messages(turns[:1], ["user"], TextConfig()) == (Message("user", "a"),)
