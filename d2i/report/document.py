"""The shell of every page: head, style, contents, sections and footer, in one file."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from d2i import __version__
from d2i.report.html import OmittedSection, Section, text

# A page cannot load anything, whatever its content.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def render_document(
    title: str, header: str, sections: Sequence[Section | OmittedSection], footer: str
) -> str:
    """Render a page; `title` is plain text, `header` and `footer` are markup."""
    css = files("d2i.report").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{text(title)}</title>\n<style>\n{css}</style></head>\n<body>"
        f"{header}\n{_contents(sections)}\n<main>\n"
        f"{''.join(map(_rendered, sections))}</main>\n"
        f"<footer>Made by d2i {text(__version__)}. {footer}</footer></body></html>\n"
    )


def render_header(eyebrow: str, heading: str, lead: str, cards: str) -> str:
    """Render the top of a page; `eyebrow` is plain text, the rest is markup."""
    return (
        f'<header class="hero"><p class="eyebrow">{text(eyebrow)}</p>'
        f'<h1>{heading}</h1><p class="lead">{lead}</p>'
        f'<div class="headline">{cards}</div></header>'
    )


def _contents(sections: Sequence[Section | OmittedSection]) -> str:
    links = "".join(
        f'<li><a href="#{section.anchor}">{text(section.title)}</a></li>'
        for section in sections
        if isinstance(section, Section)
    )
    return f'<nav aria-label="Sections"><ul>{links}</ul></nav>'


def _rendered(section: Section | OmittedSection) -> str:
    if isinstance(section, OmittedSection):
        reason = text(section.reason)
        return (
            f'<p class="left-out"><strong>{text(section.title)}</strong> omitted: {reason}.</p>\n'
        )
    return (
        f'<section id="{section.anchor}"><h2>{text(section.title)}</h2>{section.body}</section>\n'
    )
