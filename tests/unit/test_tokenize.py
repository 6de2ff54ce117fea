"""The tokenizer against the IDs of the published one, and the shape of windows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2i import tokenize
from d2i.errors import ClusterError, ConfigError, DataError
from d2i.tokenize import END_ID, START_ID, encode, window
from tests.shared import SHARED, needs_shared

IDS = st.lists(st.integers(0, START_ID - 1), max_size=400)


def golden() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((SHARED / "golden" / "tokens.json").read_bytes())
    return document


@needs_shared
def test_token_ids_match_published_tokenizer() -> None:
    rows = [row for row in golden()["strings"] if not row.get("special_literal")]
    assert len(rows) == 48
    for row in rows:
        assert encode(row["text"]) == row["ids"], row["text"]
        assert window(row["ids"], "start").tolist() == row["row77"], row["text"]


# IDs from the published merges of the words "<|", "startoftext", "endoftext" and "|>".
OPEN, START, END, CLOSE = [27, 347], [993, 6659, 4160], [40786, 4160], [91, 285]
SPECIAL = {
    "<|startoftext|>hello<|endoftext|> world": [
        *(*OPEN, *START, *CLOSE, 3306),
        *(*OPEN, *END, *CLOSE, 1002),
    ],
    "<|endoftext|>": [*OPEN, *END, *CLOSE],
}


@needs_shared
def test_golden_special_tokens_are_all_covered() -> None:
    texts = {row["text"] for row in golden()["strings"] if row.get("special_literal")}
    assert texts == set(SPECIAL)


@pytest.mark.parametrize("text", sorted(SPECIAL))
def test_special_token_literal_is_encoded_as_plain_text(text: str) -> None:
    assert encode(text) == SPECIAL[text]


def test_known_strings_have_known_token_ids() -> None:
    assert encode("a photo of a cat") == [320, 1125, 539, 320, 2368]
    assert encode("# hi") == encode("#hi") == [258, 1883]
    assert encode(" \n\t") == []
    assert encode("<start_of_text>") == [283, 1572, 318, 539, 318, 4160, 285]
    assert encode("a<|endoftext|>b") == [320, *OPEN, *END, *CLOSE, 321]


@given(st.text(st.characters(exclude_categories=[]), max_size=200))
def test_any_text_encodes_without_special_ids(text: str) -> None:
    assert all(0 <= number < START_ID for number in encode(text))


def test_long_run_of_combining_marks_is_truncated() -> None:
    """Sorting them into canonical order takes time quadratic in their number."""
    marks = "\u0316\u0301" * 16_000
    assert encode(f"a{marks} b") == encode(f"a{marks[:256]} b")
    assert len(encode(f"a{marks[:256]}")) > len(encode(f"a{marks[:200]}")) > 200


def test_encode_ignores_line_breaks_and_case() -> None:
    assert encode("Hello\r\n  WORLD") == encode("hello world")


@given(IDS, st.sampled_from(["end", "start"]), st.integers(1, 3))
def test_window_keeps_first_or_last_tokens_in_order(
    ids: list[int], keep: Any, num_windows: int
) -> None:
    row = window(ids, keep, num_windows)
    assert row.shape == (77 * num_windows,) and row.dtype == np.uint16
    pieces = row.reshape(num_windows, 77)
    assert (pieces[:, 0] == START_ID).all() and (pieces[:, -1] == END_ID).all()
    kept = [number for number in row.tolist() if number < START_ID]
    room = 75 * num_windows
    assert kept == (ids[-room:] if keep == "end" else ids[:room])
    # Padding comes last: no window begins before the previous one is full.
    fills = [(piece < START_ID).sum() for piece in pieces]
    assert fills == sorted(fills, reverse=True)


def test_window_without_tokens_is_that_of_empty_text() -> None:
    assert window([]).tolist() == [START_ID] + [END_ID] * 76


def test_window_rejects_invalid_keep_and_num_windows() -> None:
    with pytest.raises(ConfigError, match="'end' or 'start'"):
        window([1], "tail")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="1 or more"):
        window([1], num_windows=0)


def test_other_vocabulary_file_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "bpe.txt.gz"
    path.write_bytes(b"something else")
    with pytest.raises(DataError, match="expected 924691ac288e"):
        tokenize._read_merges(path)


def test_missing_vocabulary_error_names_package_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "open_clip").mkdir()
    (tmp_path / "open_clip" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ClusterError, match="pip install open_clip_torch"):
        tokenize._vocabulary_path()
