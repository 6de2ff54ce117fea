"""Every page is a Jinja template in `templates`, filled with plain values and escaped there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from d2i import __version__
from d2i.report.table import Table, rounded, without_blanks

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True)
class Section:
    """A part of a page that has something to show.

    Args:
        anchor: Its name in a URL.
        title: Its heading.
        template: The template of its content.
        values: What the template shows, as `section.values`.
        is_folded: True if the reader has to open it.
    """

    anchor: str
    title: str
    template: str
    values: Mapping[str, Any] = field(default_factory=dict)
    is_folded: bool = False


@dataclass(frozen=True)
class OmittedSection:
    """A part of a page that is left out, and the reason."""

    title: str
    reason: str


def render_page(
    template: str, title: str, sections: Sequence[Section | OmittedSection], **values: Any
) -> str:
    """Render a page with its sections, and name those that are left out.

    Args:
        template: The template of the page.
        title: Its title.
        sections: Its parts, in order.
        values: What else its template shows.
    """
    return (
        environment()
        .get_template(template)
        .render(
            title=title,
            version=__version__,
            sections=[part for part in sections if isinstance(part, Section)],
            left_out=[part for part in sections if isinstance(part, OmittedSection)],
            **values,
        )
    )


def tables_section(
    anchor: str,
    title: str,
    tables: Sequence[Table],
    *,
    intro: str = "",
    omitted: str = "",
    is_folded: bool = False,
) -> Section | OmittedSection:
    """Make a section of tables, without their blank columns and rows.

    Args:
        anchor: Its name in a URL.
        title: Its heading.
        tables: The tables.
        intro: Words before them.
        omitted: The reason to leave it out if no table has a row.
        is_folded: True if the reader has to open it.
    """
    full = [cut for table in tables if (cut := without_blanks(table)).rows]
    if not full:
        return OmittedSection(title, omitted)
    return Section(anchor, title, "tables.html", {"intro": intro, "tables": full}, is_folded)


@cache
def environment() -> Environment:
    """Return the templates: they escape every value, and an unknown name is an error."""
    made = Environment(
        loader=PackageLoader("d2i.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"rounded": rounded, "exact": repr}
    return made


def _printable(value: Any) -> Any:
    """Replace control characters, which HTML does not allow; markup has none."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", value) if type(value) is str else value
