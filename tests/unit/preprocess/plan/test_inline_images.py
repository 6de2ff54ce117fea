"""Inline images of the records are written once beside the plan, and nowhere else."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

import pytest

from d2i.cluster import Session
from d2i.config import FetchConfig
from d2i.dialog import ImageRef
from d2i.fetch.rate_limiter import create_shared_limiter
from d2i.fetch.sources import ImageSource, NetworkPolicy, build_rate_limiter
from d2i.preprocess.plan.inline_images import read_inline
from d2i.preprocess.plan.planner import Plan, PlanRequest, make_plan
from d2i.preprocess.plan.record_files import read_records
from d2i.recipes import load_recipe

NUM_DIALOGS = 40


def content(number: int) -> bytes:
    return f"picture {number} ".encode() * 9


def write_chats(directory: Path, numbers: range) -> None:
    """Write a dialog per image, one with all images again, and one without text."""
    urls = ["data:;base64," + base64.b64encode(content(n)).decode() for n in numbers]
    chats = [{"id": n, "turns": [{"text": "a", "images": [url]}]} for n, url in enumerate(urls)]
    chats.append({"id": "all", "turns": [{"text": "b", "images": urls}]})
    chats.append({"id": "none", "turns": [{"text": "", "images": urls[:1]}]})
    directory.mkdir(exist_ok=True)
    (directory / "train.jsonl").write_text("\n".join(map(json.dumps, chats)))


def plan(directory: Path, out: Path, *, limit: int | None = None, keep: bool = True) -> Plan:
    request = PlanRequest("jsonl", str(directory), "train", load_recipe("demo"), limit)
    return make_plan(request, str(out), keep=keep)


def stored_names(out: Path) -> set[str]:
    return {path.name for path in (out / "plan/inline").glob("*")}


def planned_names(out: Path) -> set[str]:
    rows = [row for path in out.glob("plan/*.parquet") for row in read_records(str(path), None)]
    assert all(row.image_ref.kind == "inline" for row in rows)
    return {row.image_ref.value[0].removeprefix("inline:") for row in rows}


def test_inline_images_of_planned_instances_are_stored_once(tmp_path: Path) -> None:
    chats, out = tmp_path / "chats", tmp_path / "out"
    write_chats(chats, range(NUM_DIALOGS))
    assert plan(chats, out).num_images == NUM_DIALOGS
    names = {hashlib.sha256(content(n)).hexdigest() for n in range(NUM_DIALOGS)}
    assert stored_names(out) == planned_names(out) == names
    for name in names:
        data = (out / "plan/inline" / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == name
    for path in (out / "plan").glob("*.*"):
        assert base64.b64encode(content(0))[:24] not in path.read_bytes()
    # A plan of another corpus leaves nothing of the first behind.
    write_chats(chats, range(NUM_DIALOGS, NUM_DIALOGS + 5))
    assert plan(chats, out).num_images == 5
    assert stored_names(out) == planned_names(out)
    assert plan(chats, tmp_path / "few", limit=3).num_instances == 3
    assert stored_names(tmp_path / "few") >= planned_names(tmp_path / "few")
    assert plan(chats, tmp_path / "dry", keep=False).num_images == 5
    assert not (tmp_path / "dry").exists()


@pytest.mark.parametrize("damage", ["none", "lost", "changed", "longer"])
def test_lost_or_damaged_inline_image_is_read_error(tmp_path: Path, damage: str) -> None:
    write_chats(tmp_path / "chats", range(1))
    plan(tmp_path / "chats", tmp_path / "out")
    (name,) = stored_names(tmp_path / "out")
    path = tmp_path / "out/plan/inline" / name
    if damage == "lost":
        path.unlink()
    elif damage == "changed":
        path.write_bytes(content(1))
    elif damage == "longer":
        path.write_bytes(content(0) + b"x")
    config, network_policy = FetchConfig(), NetworkPolicy()
    limiter = create_shared_limiter(build_rate_limiter(config, network_policy), Session(0))
    source = ImageSource(str(tmp_path / "chats"), config, network_policy, limiter)
    (found,) = source.fetch(
        [ImageRef("inline", (f"inline:{name}",))],
        lambda _, fetched: fetched,
        lambda ref, max_bytes: read_inline(str(tmp_path / "out"), ref, max_bytes),
    )
    assert found.data == (content(0) if damage == "none" else None)
    assert found.reason == ("ok" if damage == "none" else "read_error")
