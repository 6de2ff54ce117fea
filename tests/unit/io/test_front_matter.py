"""Front matter is read as plain strings, and written so that any value comes back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2i.io.front_matter import front_matter, read_front_matter


@given(st.dictionaries(st.sampled_from(["license", "base_model"]), st.text(min_size=1)))
def test_any_text_survives(values: dict[str, str]) -> None:
    text = front_matter(values) + "# Title\n---\nnot: this\n---\n"
    assert read_front_matter(text) == values


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("# A title\n", {}),
        ("", {}),
        ("---\nlicense: mit\n---", {"license": "mit"}),
        ("---\r\nlicense: mit\r\n---\r\n# A title\r\n", {"license": "mit"}),
        ("---\nlicense: 1.0\ntags: [a, no]\n---\n", {"license": "1.0", "tags": ["a", "no"]}),
        # A tag names no class, and nothing is merged.
        ("---\nlicense: !!python/name:os.system mit\n---\n", {"license": "mit"}),
        ("---\na: &a {b: c}\nd:\n  <<: *a\n---\n", {"a": {"b": "c"}, "d": {"<<": {"b": "c"}}}),
    ],
)
def test_values_are_strings_lists_and_dicts(text: str, values: dict[str, object]) -> None:
    assert read_front_matter(text) == values


@pytest.mark.parametrize("block", ["a: [", "just words", "- a", "a: b: c", "[" * 10_000, "? []"])
def test_other_content_is_refused_in_one_line(block: str) -> None:
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z"):
        read_front_matter(f"---\n{block}\n---\n")
