"""Time, rate and machine of each stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d2i.report.html import OmittedSection, Section, duration, is_number, text

_TITLE = "Times"


def stages_section(times: Mapping[str, Any] | None) -> Section | OmittedSection:
    """Show the stages in order, each with its command, its time and its share of the total."""
    stages = [s for s in (times or {}).get("stages", []) if is_number(s.get("seconds"))]
    if not times or not stages:
        return OmittedSection(_TITLE, "the stages were not timed; `d2i demo` times them")
    total_s = sum(stage["seconds"] for stage in stages)
    machine = f" on {text(times['machine'])}" if times.get("machine") else ""
    rows = "".join(_stage(stage, total_s) for stage in stages)
    intro = f'<p class="intro">{duration(total_s)} in total{machine}.</p>'
    return Section("times", _TITLE, f'{intro}<ol class="stages">{rows}</ol>')


def _stage(stage: Mapping[str, Any], total_s: float) -> str:
    share = 100 * stage["seconds"] / total_s if total_s else 0.0
    command = f"<code>{text(stage['command'])}</code>" if stage.get("command") else ""
    details = [stage.get("detail"), "last attempt only" if stage.get("resumed") else None]
    detail = "".join(f'<span class="detail">{text(d)}</span>' for d in details if d)
    return (
        f'<li><div class="stage-head"><strong>{text(stage.get("name", "stage"))}</strong>{detail}'
        f'<span class="amount">{duration(stage["seconds"])}</span></div>'
        f'<div class="track" aria-hidden="true"><i class="bar last" style="width:{share:.2f}%"></i>'
        f"</div>{command}</li>"
    )
