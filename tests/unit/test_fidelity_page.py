"""docs/fidelity.md is complete, and every row marked "same" names an existing test."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "fidelity.md"
VERDICTS = {"same", "ours", "differs"}
OF_THE_PAPER = (
    *("2.1", "2.2", "3.1", "3.2", "3.3", "3.4", "4.1", "4.2", "4.3", "Appendix A"),
    *("Equation 1", "Algorithm 1", "Algorithm 2"),
    *(f"Table {number}" for number in range(1, 8)),
    *(f"Figure {number}" for number in range(3, 6)),
)


def rows() -> list[list[str]]:
    """Return the cells of every row that has a verdict."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if len(row) > 2 and row[-2] in VERDICTS]


@cache
def functions_of(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("part", OF_THE_PAPER)
def test_fidelity_page_has_row_for_every_part_of_paper(part: str) -> None:
    assert [row for row in rows() if row[0] == part]


def test_fidelity_rows_marked_same_name_existing_test() -> None:
    same = [row for row in rows() if row[-2] == "same"]
    assert len(same) > 20
    for row in same:
        named = re.fullmatch(r"`(tests/\S+\.py)::(test_\w+)`", row[-1])
        assert named, row
        assert named[2] in functions_of(named[1]), row


def test_fidelity_rows_not_same_give_a_reason() -> None:
    for row in rows():
        if row[-2] != "same":
            assert len(row[-1].split()) > 5, row


def test_paths_named_on_fidelity_page_exist() -> None:
    for row in rows():
        for path in re.findall(r"`((?:d2i|eval|tests|docs)/[\w/.]+)`", " ".join(row)):
            assert (ROOT / path).exists(), row
