"""Names and prose keep to the glossary: one word a thing."""

from __future__ import annotations

import importlib
import re
import subprocess
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.glossary import (
    PAGE,
    ROOT,
    TABLE,
    Text,
    docstrings,
    glossary_page,
    names,
    prose,
    split_name,
)

QUESTION = re.compile(r"(What|Which|How|Whether|Where|Who|Whose|Why)\b")


@cache
def files(*suffixes: str) -> list[Path]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True)
    listed = [ROOT / line for line in done.stdout.splitlines()]
    return [path for path in listed if path.suffix in suffixes and path != PAGE]


def pattern(words: list[str]) -> re.Pattern[str]:
    """Return a pattern of any of these words or phrases, singular or plural."""
    return re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, words))})(?:e?s)?(?![\w-])", re.I)


def avoided(kind: str) -> list[str]:
    return [word for term in TABLE["term"] for word in (*term.get("not", ()), *term.get(kind, ()))]


@cache
def uses(kind: str) -> list[tuple[Text, str]]:
    """Return each use of a word that the glossary avoids, in names or in prose."""
    read, suffixes = (names, (".py",)) if kind == "not_names" else (prose, (".py", ".md"))
    found = pattern(avoided(kind))
    # Parsing costs the most, so files without any of the letters are passed over.
    letters = re.compile(
        "|".join(re.escape(word).replace(r"\ ", r"\W*_?") for word in avoided(kind)), re.I
    )
    return [
        (text, word[0].lower())
        for path in files(*suffixes)
        if letters.search(path.read_text())
        for text in read(path)
        for word in found.finditer(text.text)
    ]


def is_allowed(allowance: dict[str, Any], text: Text, word: str) -> bool:
    is_word = any(pattern([listed]).fullmatch(word) for listed in allowance["words"])
    return is_word and any(fnmatch(text.path, place) for place in allowance["paths"])


@pytest.mark.parametrize("kind", ["not_names", "not_prose"])
def test_glossary_words_are_used_in_names_and_prose(kind: str) -> None:
    wrong = [
        f"{text.path}:{text.line}: {word!r} in {text.text[:80]!r}"
        for text, word in uses(kind)
        if not any(is_allowed(allowance, text, word) for allowance in TABLE["allowed"])
    ]
    assert not wrong, "see docs/glossary.md\n" + "\n".join(wrong)


def test_every_allowed_exception_is_still_needed() -> None:
    found = [use for kind in ("not_names", "not_prose") for use in uses(kind)]
    for allowance in TABLE["allowed"]:
        for word in allowance["words"]:
            for path in allowance["paths"]:
                one = {"words": [word], "paths": [path]}
                assert any(is_allowed(one, *use) for use in found), (word, path)


def test_docstrings_begin_with_what_a_thing_is_or_does() -> None:
    wrong = [
        f"{text.path}:{text.line}: {text.text[:60]!r}"
        for path in files(".py")
        for text in docstrings(path)
        if QUESTION.match(text.text)
    ]
    assert not wrong, "\n".join(wrong)


def test_glossary_page_is_written_from_its_table() -> None:
    assert PAGE.read_text() == glossary_page(), "run `python -m tests.glossary`"


def test_glossary_code_exists() -> None:
    for term in TABLE["term"]:
        if "code" in term:
            module, _, attributes = term["code"].partition(":")
            found: Any = importlib.import_module(module)
            for attribute in filter(None, attributes.split(".")):
                found = getattr(found, attribute)


@pytest.mark.parametrize(
    ("name", "words"),
    [("_HTTPServer", "http server"), ("num_images", "num images"), ("ImageRef", "image ref")],
)
def test_split_name_splits_snake_and_camel_case(name: str, words: str) -> None:
    assert split_name(name) == words


def test_avoided_words_are_found_in_names_comments_docstrings_and_messages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.glossary.ROOT", tmp_path)
    path = tmp_path / "d2i" / "module.py"
    path.parent.mkdir()
    path.write_text(
        '"""Pictures."""\n# a picture\nold_picture = f"the picture {1}"\nok = "picture"\n'
    )
    found = pattern(["picture"])
    assert [text.line for text in names(path) if found.search(text.text)] == [3]
    assert sorted(text.line for text in prose(path) if found.search(text.text)) == [1, 2, 3]
