"""Building blocks of HTML: escaped text, exact figures, images as data URIs, and sections."""

from __future__ import annotations

import base64
import html
import io
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from PIL import Image

from d2i.images.decode import turn_upright
from d2i.images.png_chunks import without_metadata

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
_TAG = re.compile(r"<[^>]*>")
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_MAX_SIDE_PX = 480
_MAX_BYTES = 120_000
_MAX_MEGAPIXELS = 90


@dataclass(frozen=True)
class Section:
    """A part of the page that has something to show."""

    anchor: str
    title: str
    body: str


@dataclass(frozen=True)
class OmittedSection:
    """A part of the page that is left out, and the reason."""

    title: str
    reason: str


def text(value: Any) -> str:
    """Escape a value for use between tags and in quoted attributes."""
    return html.escape(_CONTROLS.sub("\ufffd", str(value)), quote=True)


def capitalised(value: str) -> str:
    """Escape a label and raise its first letter."""
    return text(value[:1].upper() + value[1:])


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a JSON value is a number that can be shown: finite, and not a boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def figure(value: float, spec: str, unit: str = "") -> str:
    """Render a number rounded by a format spec; the element keeps the exact value of the file."""
    shown = format(value, spec).replace("-", "\N{MINUS SIGN}")
    return f'<data value="{value!r}" title="{value!r}">{shown}{unit}</data>'


def counted(number: int, noun: str) -> str:
    """Render a count with its noun, in the singular or with an s."""
    return f"{figure(number, ',')} {noun if number == 1 else noun + 's'}"


def percent(fraction: float) -> str:
    """Render a fraction of 0..1 as a percentage."""
    shown = f"{100 * fraction:.1f}\N{NARROW NO-BREAK SPACE}%"
    return f'<data value="{fraction!r}" title="{fraction!r}">{shown}</data>'


def duration(seconds: float) -> str:
    """Render seconds in readable units; the element keeps the exact number."""
    if seconds < 60:
        shown = f"{seconds:.1f} s"
    else:
        minutes, rest = divmod(round(seconds), 60)
        shown = f"{minutes} min {rest:02d} s"
        if minutes >= 60:
            shown = f"{minutes // 60} h {minutes % 60:02d} min"
    spaced = shown.replace(" ", "\N{NO-BREAK SPACE}")
    return f'<data value="{seconds!r}" title="{seconds!r} s">{spaced}</data>'


def table(head: Iterable[str], rows: Iterable[tuple[str, Iterable[str]]], caption: str = "") -> str:
    """Render a table of ready-made cells; each row is its heading and its other cells.

    The text of the caption also labels the region that scrolls sideways.
    """
    heads = "".join(f'<th scope="col">{cell}</th>' if cell else "<td></td>" for cell in head)
    lines = (
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for name, cells in rows
    )
    title = f"<caption>{caption}</caption>" if caption else ""
    name = _TAG.sub("", caption) or "Table"
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{name}"><table>{title}'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def card(
    title: str, values: Sequence[tuple[str, str]], note: str, *, is_sequence: bool = False
) -> str:
    """Render a card of headline values, each its plain name and its ready-made value.

    If they are a sequence, such as before and after, the last value stands out.
    """
    last = len(values) - 1 if is_sequence else None
    items = "".join(
        f'<div class="value{" last" if number == last else ""}">'
        f"<dt>{text(name)}</dt><dd>{value}</dd></div>"
        for number, (name, value) in enumerate(values)
    )
    kind = "pair" if is_sequence and len(values) == 2 else "list"
    return (
        f'<section class="card"><h2>{title}</h2><dl class="values {kind}">{items}</dl>'
        f'<p class="note">{note}</p></section>'
    )


def image_tag(data: bytes | None, alt: str) -> str:
    """Render an `<img>` with embedded data, or a note if there is no readable image."""
    address = None if data is None else image_uri(data)
    if address is None:
        return f'<div class="no-image" role="img" aria-label="{text(alt)}">not readable</div>'
    return f'<img src="{address}" alt="{text(alt)}">'


def image_uri(data: bytes) -> str | None:
    """Return an image as a data URI, downscaled if it is large; None if it cannot be read.

    Only small still images in PNG, JPEG or WebP pass unchanged, except for their metadata.
    """
    try:
        data = without_metadata(data)
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > _MAX_MEGAPIXELS * 1_000_000:
                return None
            kind, animated = str(image.format), getattr(image, "n_frames", 1) > 1
            fits = max(image.size) <= _MAX_SIDE_PX and len(data) <= _MAX_BYTES
            image.load()
            if animated or kind == "GIF" or not fits:
                kind, data = "JPEG", _reduced(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode('ascii')}"


def _reduced(image: Image.Image) -> bytes:
    turn_upright(image)
    small = image.convert("RGB")
    small.thumbnail((_MAX_SIDE_PX, _MAX_SIDE_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def count_cells(values: Iterable[Any]) -> list[str]:
    """Return a cell with the count of each split, and their sum if there are several."""
    counts = list(values)
    if len(counts) > 1:
        counts.append(sum(counts) if all(map(is_number, counts)) else None)
    return [figure(count, ",") if is_number(count) else "not recorded" for count in counts]


def reason_rows(
    counts: Collection[Mapping[str, Any]], heading: Callable[[str], str]
) -> list[tuple[str, list[str]]]:
    """Make one row per reason, sorted, from the counts by reason of each split."""
    reasons = sorted({reason for found in counts for reason in found})
    return [
        (heading(reason), count_cells(found.get(reason, 0) for found in counts))
        for reason in reasons
    ]
