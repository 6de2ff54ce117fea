"""Linearization, instance keys and their random order."""

import re
import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from d2i.dialog import Turn, key_order_hash, linearize, make_key
from d2i.errors import ConfigError, DataError

INDEX = st.integers(0, 10**6)
NAMED = [Turn(1, "hi"), Turn(0, "look"), Turn(1, "nice")]


@pytest.mark.parametrize(
    ("strategy", "line"),
    [
        ("hash", "# hi # look # nice"),
        ("space", "hi look nice"),
        ("special", "[PER1] hi [PER2] look [PER1] nice"),
        ("letters", "A: hi B: look A: nice"),
        ("<{speaker}{letter}|{text}>", "<1A|hi> <2B|look> <1A|nice>"),
        ("{text} {unknown}", "hi {unknown} look {unknown} nice {unknown}"),
    ],
)
def test_linearize_matches_golden_lines(strategy: str, line: str) -> None:
    assert linearize(NAMED, strategy) == line


def test_linearize_defaults_to_hash() -> None:
    assert linearize(NAMED) == linearize(NAMED, "hash")


def test_turns_without_speaker_alternate_and_empty_ones_count() -> None:
    turns = [Turn(None, text) for text in ["a", "b", "", "d", " \n", "f"]]
    assert linearize(turns, "letters") == "A: a B: b B: d B: f"
    assert linearize(turns) == "# a # b # d # f"


def test_first_speaker_with_text_is_letter_a() -> None:
    assert linearize([Turn(None, ""), Turn(None, "b"), Turn(None, "c")], "letters") == "A: b B: c"


def test_turn_without_speaker_answers_previous_turn() -> None:
    assert (
        linearize([Turn(1, "a"), Turn(None, "b"), Turn(None, "c")], "letters") == "A: a B: b A: c"
    )


def test_more_than_26_speakers_get_double_letters() -> None:
    line = linearize([Turn(number, "x") for number in range(28)], "letters")
    assert line.startswith("A: x B: x") and line.endswith("Z: x AA: x AB: x")


def test_braces_in_text_are_not_placeholders() -> None:
    assert linearize([Turn(0, "{speaker} {text}")], "{speaker}: {text}") == "1: {speaker} {text}"


def test_empty_context_linearizes_to_empty_string() -> None:
    assert linearize([], "special") == linearize([Turn(0, " ")], "special") == ""


def test_unknown_strategy_error_suggests_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'letters'"):
        linearize(NAMED, "leters")


def test_make_key_joins_plain_parts() -> None:
    assert make_key("train", "17", 3, 1) == "train-17-3-1"
    assert make_key("test", "-17_a", 0, 0) == "test--17_a-0-0"


PARTS = st.tuples(st.text(max_size=80), st.text(max_size=80), INDEX, INDEX)


@given(PARTS, PARTS)
@example(("a", "b-1", 2, 3), ("a-b", "1", 2, 3))
@example(("a", "b", 1, 2), ("a", "b\n", 1, 2))
@example(("a", "x/y", 1, 2), ("a", "x.y", 1, 2))
@example(("a", "ä", 1, 2), ("a", "a\u0308", 1, 2))
def test_make_key_is_filename_safe_and_unique(
    one: tuple[str, str, int, int], other: tuple[str, str, int, int]
) -> None:
    keys = make_key(*one), make_key(*other)
    for key in keys:
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", key)
        assert len(key) <= 200
    assert (keys[0] == keys[1]) == (one == other)


@given(st.text(max_size=80))
def test_id_that_imitates_an_escaped_id_gets_another_key(dialog_id: str) -> None:
    changed = make_key("train", dialog_id, 0, 0).removeprefix("train-").removesuffix("-0-0")
    if changed != dialog_id:
        assert make_key("train", changed, 0, 0) != make_key("train", dialog_id, 0, 0)


def test_make_key_rejects_negative_index() -> None:
    with pytest.raises(DataError, match="turn -1"):
        make_key("train", "1", -1, 0)


def test_key_order_hash_is_stable_and_seeded() -> None:
    assert key_order_hash("train-0-0-0", 0) == 17544198875272659365
    keys = [f"train-{number}-0-0" for number in range(2000)]
    orders = [sorted(keys, key=lambda key: key_order_hash(key, seed)) for seed in (1, 2)]
    assert orders[0] != orders[1]
    assert all(0 <= key_order_hash(key, 1) < 2**64 for key in keys)
    # About half of the thousand smallest hashes belong to the first thousand numbers.
    early = sum(int(key.split("-")[1]) < 1000 for key in orders[0][:1000])
    assert 400 < early < 600


def test_turns_are_hashable_comparable_and_frozen() -> None:
    assert {Turn(None, "a"), Turn(None, "a")} == {Turn(None, "a")}
    assert Turn(None, "a") != Turn(0, "a")
    with pytest.raises(AttributeError):
        Turn(None, "a").text = "b"  # type: ignore[misc]


def test_dialog_and_corpora_import_no_torch() -> None:
    code = (
        "import sys, d2i.dialog, d2i.corpora, d2i.tokenize;"
        "print(sorted({'torch', 'transformers', 'ray', 'open_clip'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
