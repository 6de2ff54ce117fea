"""Rows of the doctor's report, and the runner of checks, each isolated from the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from d2i.errors import missing_extra

Status = Literal["ok", "warn", "fail"]

INSTALL_ALL = 'pip install "d2i[all]"'
REINSTALL = "make clean setup, or pip install -c constraints.txt -e '.[all]'"


@dataclass(frozen=True)
class Check:
    """One row of the doctor's report.

    Args:
        name: Part that was checked.
        status: `ok`; `warn`: some work is impossible or slow; `fail`: the demo cannot run.
        detail: Finding, in one line.
        fix: Next step, in one line; empty if nothing needs doing.
    """

    name: str
    status: Status
    detail: str
    fix: str = ""


def run_checks(named: Iterable[tuple[str, Callable[[], Check]]]) -> Iterator[Check]:
    """Run named checks, each isolated from the others: an exception becomes its `fail` row."""
    for name, check in named:
        try:
            yield check()
        except ModuleNotFoundError as err:
            fix = INSTALL_ALL if missing_extra(err) else REINSTALL
            yield Check(name, "fail", first_line(err), fix)
        except Exception as err:
            yield Check(name, "fail", f"{type(err).__name__}: {first_line(err)}", REINSTALL)


def first_line(err: BaseException) -> str:
    """Return the first line of an error's message."""
    return (str(err).strip().splitlines() or ["no message"])[0]
