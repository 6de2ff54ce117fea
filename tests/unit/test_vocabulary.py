"""Names are those that an engineer of this field would search for, one name per concept."""

from __future__ import annotations

import ast
import importlib
import json
import re
from functools import cache
from typing import Any

import pytest

from tests.glossary import ROOT, identifiers

VOCABULARY: dict[str, Any] = json.loads((ROOT / "tests" / "vocabulary.json").read_text())
STEMS = {"atomic": "atomically", "eviction": "evict"}


@cache
def names_of_code() -> set[str]:
    directories = (ROOT / "d2i", ROOT / "benchmarks" / "demo_weights")
    paths = (path for directory in directories for path in directory.rglob("*.py"))
    return {found.text for path in paths for found in identifiers(path)}


@pytest.mark.parametrize("term", VOCABULARY["terms"])
def test_every_field_term_names_code_and_test(term: str) -> None:
    qualified, test = VOCABULARY["terms"][term]
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", qualified).lower()
    for word in term.lower().split():
        assert STEMS.get(word, word) in words, qualified
    module, _, attributes = qualified.partition(":")
    found: Any = importlib.import_module(module)
    for attribute in attributes.split("."):
        found = getattr(found, attribute)
    file, _, name = test.partition("::")
    assert name in {
        node.name
        for node in ast.walk(ast.parse((ROOT / file).read_text()))
        if isinstance(node, ast.FunctionDef)
    }


def test_modules_have_their_new_names() -> None:
    for old, new in VOCABULARY["modules"].items():
        assert not (ROOT / f"{old.replace('.', '/')}.py").exists(), old
        assert (ROOT / f"{new.replace('.', '/')}.py").exists(), new


def test_classes_and_functions_have_their_new_names() -> None:
    names = VOCABULARY["names"]
    assert not names.keys() & names_of_code()
    assert set(names.values()) <= names_of_code()
