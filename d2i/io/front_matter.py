"""The front matter of a Markdown file: YAML between two lines `---`, as the hub's cards have it.

Must not import any part of d2i.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

# As the hub itself finds it.
_BLOCK = re.compile(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)


def read_front_matter(text: str) -> dict[str, Any]:
    """Return the values of a text's front matter; empty if it has none.

    The text may be a stranger's, so nothing in it is interpreted: every value is a string, a list
    or a dict.

    Raises:
        ValueError: If it is not YAML, or not a mapping; the message is one line.
    """
    block = _BLOCK.match(text)
    if block is None:
        return {}
    try:
        # The base loader knows neither tags nor merged keys, which can take exponential time.
        values = yaml.load(block[1], Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as err:
        raise ValueError(" ".join(str(err).split())[:200]) from err
    if not isinstance(values, dict):
        raise ValueError(f"a YAML {type(values).__name__}, not a mapping")  # noqa: TRY004
    return values


def front_matter(values: Mapping[str, Any]) -> str:
    """Return a front matter that holds values, whatever characters they have."""
    return f"---\n{yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)}---\n"
