"""The glossary: one term per concept. `python -m tests.glossary` writes docs/glossary.md.

The table is `docs/glossary.toml`; `tests/unit/test_glossary.py` holds the repository to it.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "glossary.md"
TABLE: dict[str, Any] = tomllib.loads((ROOT / "docs" / "glossary.toml").read_text())
_INTRO = """# Glossary

One term per concept, in code, `--help`, messages and docs. Written by `python -m tests.glossary`
from [glossary.toml](glossary.toml); a test holds every name and sentence of the repository to it.
"""
_CODE = re.compile(r"```.*?```|``.+?``|`[^`]+`|\]\([^)]*\)|https?://\S+", re.DOTALL)


# Where nodes of the syntax tree have identifiers; unlike tokens, they are also found in f-strings.
_NAME_FIELDS = ("id", "attr", "arg", "name", "asname", "module")


class Text(NamedTuple):
    """A name or a piece of prose, with its file (relative to the repository) and line."""

    path: str
    line: int
    text: str


def glossary_page() -> str:
    """Return docs/glossary.md, as written from the table."""
    parts = [_INTRO]
    for area in dict.fromkeys(term["area"] for term in TABLE["term"]):
        parts.append(f"\n## {area}\n\n| term | meaning | code |\n|---|---|---|\n")
        parts += [_row(term) for term in TABLE["term"] if term["area"] == area]
    return "".join(parts)


def _row(term: dict[str, Any]) -> str:
    avoided = [*term.get("not", ()), *term.get("not_names", ()), *term.get("not_prose", ())]
    note = f" Not: {', '.join(f'*{word}*' for word in avoided)}." if avoided else ""
    code = f"`{term['code']}`" if "code" in term else ""
    return f"| **{term['term']}** | {term['meaning']}{note} | {code} |\n"


def identifiers(path: Path) -> Iterator[Text]:
    """Yield the identifiers of a Python file."""
    for node in ast.walk(ast.parse(path.read_text())):
        for field in _NAME_FIELDS:
            if isinstance(name := getattr(node, field, None), str):
                yield Text(_relative(path), getattr(node, "lineno", 0), name)


def names(path: Path) -> Iterator[Text]:
    """Yield the identifiers of a Python file, each as its lower-case words with spaces between."""
    yield from (found._replace(text=split_name(found.text)) for found in identifiers(path))


def split_name(name: str) -> str:
    """Return the words of an identifier in lower case, split at `_` and at changes of case."""
    split = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return " ".join(word for word in split.lower().split("_") if word)


def prose(path: Path) -> Iterator[Text]:
    """Yield the prose of a file, without code in backticks and without URLs.

    Of Markdown the lines; of Python the comments, the docstrings and, in d2i, every string with a
    space in it: messages and help.
    """
    source = path.read_text()
    if path.suffix == ".md":
        text = _CODE.sub(lambda found: "\n" * found[0].count("\n"), source)
        for n, line in enumerate(text.splitlines(), 1):
            yield Text(_relative(path), n, line)
        return
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield Text(_relative(path), token.start[0], _CODE.sub("", token.string))
    yield from (text._replace(text=_CODE.sub("", text.text)) for text in docstrings(path))
    if _relative(path).startswith("d2i/"):
        yield from _messages(path)


def docstrings(path: Path) -> Iterator[Text]:
    """Yield the docstrings of a Python file: of modules, classes, functions and fields."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield Text(_relative(path), node.lineno, " ".join(str(node.value.value).split()))


def _messages(path: Path) -> Iterator[Text]:
    tree = ast.parse(path.read_text())
    own = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or node in own:
            continue
        if isinstance(node.value, str) and " " in node.value:
            yield Text(_relative(path), node.lineno, _CODE.sub("", node.value))


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


if __name__ == "__main__":
    PAGE.write_text(glossary_page())
