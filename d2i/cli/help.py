"""The pages of --help: commands and options in groups, and examples that are never cut.

typer's own pages cut long options at 80 columns, break examples, and take twice as long to import.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any

from typer.core import TyperCommand, TyperGroup

from d2i.io.terminal import is_terminal, wants_colors

START, DATA, TRAINING = "Start here", "Data", "Training"
EVALUATION, MACHINE = "Evaluation", "Machine"
"""The groups of commands."""
INSTANCES, READING, FETCHING = "Instances", "Reading the data", "Fetching"
WORKERS, RANKS, FORECAST = "Workers", "Ranks", "Forecast"
"""The groups of options; the others are under Options."""
_EXAMPLES = "\n\nExamples:\n\n"
_MAX_NAME_COLUMNS, _MIN_NAME_COLUMNS = 30, 22


class Command(TyperCommand):
    """A command."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the page."""
        formatter.write(_page(self, ctx))


class Group(TyperGroup):
    """A group of commands."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the page."""
        formatter.write(_page(self, ctx))


def help_text(function: Callable[..., None]) -> str:
    """Return a command's docstring with each paragraph, and each example, as one line."""
    paragraphs = inspect.cleandoc(function.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def sentence(function: Callable[..., None]) -> str:
    """Return the first line of a command's docstring, for the list of commands."""
    return inspect.cleandoc(function.__doc__ or "").partition("\n")[0]


def _page(command: TyperCommand | TyperGroup, context: Any) -> str:
    from rich.console import Console

    has_colors = is_terminal(sys.stdout) and wants_colors()
    console = Console(
        color_system="auto" if has_colors else None, highlight=False, markup=False, emoji=False
    )
    text, _, examples = (command.help or "").partition(_EXAMPLES)
    with console.capture() as page:
        console.print(command.get_usage(context), style="bold")
        for paragraph in text.split("\n\n"):
            console.print(f"\n{paragraph}")
        console.print()
        for title, rows in _panels(command, context).items():
            _print_panel(console, title, rows)
        if examples:
            console.print("Examples:", style="bold")
            for line in examples.split("\n\n"):
                # Longer than the terminal, it is wrapped there, and still pasted as one line.
                console.print(f"  {line}", soft_wrap=True)
        if command.epilog:
            console.print(f"\n{command.epilog}")
    return page.get()


def _panels(command: TyperCommand | TyperGroup, context: Any) -> dict[str, list[tuple[str, str]]]:
    """Return the names and the help of everything on the page, by the title of its panel."""
    panels: dict[str, list[tuple[str, str]]] = {}
    children: dict[str, Any] = dict(command.commands) if isinstance(command, TyperGroup) else {}
    # The sentences of all groups begin in one column.
    longest = max(map(len, children), default=0)
    for name, child in children.items():
        row = (name.ljust(longest), child.short_help or child.help or "")
        panels.setdefault(child.rich_help_panel or "Commands", []).append(row)
    own: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
    for parameter in command.get_params(context):
        record: tuple[str, str] | None = parameter.get_help_record(context)
        default = "Arguments" if parameter.param_type_name == "argument" else "Options"
        if record:
            panel = getattr(parameter, "rich_help_panel", None) or default
            own.setdefault(panel, []).append(record)
    return {title: rows for title, rows in (panels | own).items() if rows}


def _print_panel(console: Any, title: str, rows: Iterable[tuple[str, str]]) -> None:
    from rich.panel import Panel
    from rich.table import Table

    is_wide = console.width >= 70
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(
        style="cyan", max_width=_MAX_NAME_COLUMNS if is_wide else _MIN_NAME_COLUMNS, overflow="fold"
    )
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(Panel(table, title=title, title_align="left", border_style="dim"))
