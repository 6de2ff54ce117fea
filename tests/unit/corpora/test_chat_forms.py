"""Chat formats that users bring: each is read, or the part that is not read is named."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from d2i.corpora import RecordIssue, read_instances
from d2i.corpora.inline import InlineImages
from d2i.dialog import Instance, linearize
from d2i.errors import DataError

CONTENT = b"\x89PNG what a picture may hold"
DATA_URL = "data:image/png;base64," + base64.b64encode(CONTENT).decode()


def read(
    directory: Path, *records: Any, name: str = "train.jsonl", inline: InlineImages | None = None
) -> tuple[list[Instance], list[RecordIssue]]:
    text = "\n".join(map(json.dumps, records)) if name.endswith("l") else json.dumps(records)
    (directory / name).write_text(text)
    issues: list[RecordIssue] = []
    options: dict[str, Any] = {} if inline is None else {"inline": inline}
    found = read_instances(
        "jsonl", directory, "train", on_problem=issues.append, max_broken=1.0, **options
    )
    return list(found), issues


def contexts_and_images(found: list[Instance]) -> list[tuple[str, str]]:
    return [(linearize(i.context, "letters"), i.image_ref.value[0]) for i in found]


USER = {"role": "user", "content": "show me"}
FORMS: dict[str, dict[str, Any]] = {
    "marks": {
        "messages": [USER, {"role": "assistant", "content": "<image> here"}],
        "images": ["p/1.jpg"],
    },
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "show me"},
            {"from": "gpt", "value": "<image>\nhere"},
        ],
        "image": "p/1.jpg",
    },
    "sharegpt with roles": {
        "conversations": [USER, {"role": "assistant", "content": "here <image>"}],
        "images": "p/1.jpg",
    },
    "trl": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "show me"}]},
            {
                "role": "assistant",
                "content": [{"type": "image"}, {"type": "text", "text": "here"}],
            },
        ],
        "images": [{"bytes": None, "path": "p/1.jpg"}],
    },
    "listed in the message": {
        "messages": [USER, {"role": "assistant", "content": "here", "images": ["p/1.jpg"]}]
    },
    "responses api": {
        "messages": [
            {"role": "user", "content": [{"type": "input_text", "text": "show me"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "output_text", "text": "here"},
                    {"type": "input_image", "image_url": "p/1.jpg"},
                ],
            },
        ]
    },
    "part with a url": {
        "messages": [
            USER,
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "here"}, {"type": "image", "url": "p/1.jpg"}],
            },
        ]
    },
}


@pytest.mark.parametrize("name", ["train.jsonl", "train.json"])
@pytest.mark.parametrize("form", FORMS)
def test_every_chat_format_gives_same_instance(tmp_path: Path, form: str, name: str) -> None:
    record = {"id": 1, **FORMS[form]}
    found, issues = read(tmp_path, record, record | {"id": 2}, name=name)
    assert issues == []
    assert contexts_and_images(found) == [("A: show me B: here", "p/1.jpg")] * 2
    assert [instance.key for instance in found] == ["train-1-1-0", "train-2-1-0"]


def test_image_marks_take_listed_images_in_order(tmp_path: Path) -> None:
    record = {
        "id": 1,
        "messages": [
            {"role": "system", "content": "<image> is your face"},
            {"role": "user", "content": "<image>one<image>\n<image> two"},
            {
                "role": "assistant",
                "content": [{"type": "image"}, {"type": "text", "text": "<image>x"}],
            },
        ],
        "images": [f"{n}.jpg" for n in range(6)],
    }
    found, issues = read(tmp_path, record)
    assert [(i.turn, i.image, *contexts_and_images([i])[0]) for i in found] == [
        (1, 0, "A: one two", "1.jpg"),
        (1, 1, "A: one two", "2.jpg"),
        (1, 2, "A: one two", "3.jpg"),
        (2, 0, "A: one two B: x", "4.jpg"),
        (2, 1, "A: one two B: x", "5.jpg"),
    ]
    assert [issue.reason for issue in issues] == ["no_image"]


@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_mark_and_image_count_mismatch_is_record_issue(tmp_path: Path, num_images: int) -> None:
    record = FORMS["marks"] | {"images": ["p/1.jpg"] * num_images}
    record["messages"] = [USER, {"role": "assistant", "content": "<image><image> here"}]
    found, (issue,) = read(tmp_path, {"id": 1, **record})
    assert (found, issue.reason) == ([], "mismatched_images")
    assert issue.detail.startswith(f"images: got {num_images}, but 2 marks <image>")


UNREAD: dict[str, tuple[dict[str, Any], str]] = {
    "no mark": (FORMS["marks"] | {"messages": [USER]}, "images: got 1, but 0 marks <image>"),
    "beside turns": (
        {"turns": [{"text": "a"}], "images": ["1.jpg"]},
        "images: got them beside 'turns'",
    ),
    "beside others": (
        FORMS["part with a url"] | {"images": ["2.jpg"]},
        "images: got 1 but no mark <image>",
    ),
    "no place": (FORMS["marks"] | {"images": [{"bytes": "x"}]}, "images[0]: expected a path"),
    "no role": ({"messages": [{"content": "a"}]}, "turn 0: both role and from are missing"),
}


@pytest.mark.parametrize("case", UNREAD)
def test_unread_chat_part_is_named_in_record_issue(tmp_path: Path, case: str) -> None:
    record, detail = UNREAD[case]
    _, (issue,) = read(tmp_path, {"id": 1, **record})
    assert issue.detail.startswith(detail)


def test_image_mark_is_text_without_listed_images(tmp_path: Path) -> None:
    turn = {"role": "user", "content": [{"type": "text", "text": "<image> is a tag"}]}
    record = {
        "id": 1,
        "messages": [turn, {"role": "user", "content": [{"type": "image", "image": "1.jpg"}]}],
    }
    found, issues = read(tmp_path, record)
    assert (contexts_and_images(found), issues) == ([("A: <image> is a tag", "1.jpg")], [])


def test_data_url_image_ref_is_sha256_of_content(tmp_path: Path) -> None:
    part = {"type": "image_url", "image_url": {"url": DATA_URL}}
    record = {"messages": [USER, {"role": "assistant", "content": [part, part]}]}
    kept: list[tuple[str, bytes]] = []
    inline = InlineImages(keep=lambda sha256, data: kept.append((sha256, data)))
    found, issues = read(tmp_path, {"id": 1, **record}, inline=inline)
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    assert issues == []
    assert {i.image_ref.value for i in found} == {(f"inline:{sha256}",)}
    assert {i.image_ref.kind for i in found} == {"inline"}
    assert kept == [(sha256, CONTENT)] * 2


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        (DATA_URL[:-3], "bad_image_ref"),
        (DATA_URL.replace(";base64", ""), "bad_image_ref"),
        ("data:image/png;base64,", "bad_image_ref"),
        ("data:image/png;base64,é", "bad_image_ref"),
        ("data:" + "x" * 600 + ";base64,AA==", "bad_image_ref"),
        ("data:;base64," + "A" * 4000, "too_large"),
    ],
)
def test_invalid_or_oversized_data_url_is_record_issue(
    tmp_path: Path, url: str, reason: str
) -> None:
    record = {"id": 1, "turns": [{"text": "a", "images": [url, "1.jpg"]}]}
    found, (issue,) = read(tmp_path, record, inline=InlineImages(max_bytes=2000))
    assert [i.image_ref.value for i in found] == [("1.jpg",)]
    assert issue.reason == reason
    assert url[30:] not in issue.detail or len(url) < 40


def test_record_may_hold_large_inline_images(tmp_path: Path) -> None:
    """Longer than a record of text may be."""
    url = "data:image/png;base64," + base64.b64encode(bytes(9 << 20)).decode()
    record = {"id": 1, "turns": [{"text": "a", "images": [url]}]}
    found, issues = read(tmp_path, record, record | {"id": 2})
    assert (len(found), issues) == (2, [])


LINE = '{"id":"0","turns":[{"text":"a","images":["p/0.jpg"]}]}\n'
FOREIGN = {
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    "web page": b"\n<!DOCTYPE html>\n<html>sign in</html>\n",
    "UTF-16": LINE.encode("utf-16"),
    "UTF-16 text": LINE.encode("utf-16-le"),
    "gunzip": gzip.compress(LINE.encode()),
    "zip archive": b"PK\x03\x04rest",
    "Parquet": b"PAR1rest",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_file_type_is_named_in_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "train.jsonl").write_bytes(FOREIGN[name])
    with pytest.raises(DataError, match=rf"train\.jsonl is .*{name}") as caught:
        list(read_instances("jsonl", tmp_path, "train"))
    assert "max_broken" not in str(caught.value)


def test_file_without_records_is_error_without_max_broken_hint(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("hello\nworld\n")
    with pytest.raises(DataError, match=r"no record could be read: .*train\.jsonl") as caught:
        list(read_instances("jsonl", tmp_path, "train", on_problem=lambda _: None))
    assert "max_broken" not in str(caught.value)


def test_max_broken_error_shows_first_record_of_each_reason(tmp_path: Path) -> None:
    sound = {"id": 0, "turns": [{"text": "a", "images": ["1.jpg"]}]}
    records = [sound, {"id": 1, "turns": [{"text": 5}]}, {"id": 2}, {"id": 3}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    with pytest.raises(DataError) as caught:
        list(read_instances("jsonl", tmp_path, "train", on_problem=lambda _: None))
    assert "2 missing_field (first: train.jsonl line 3: turns: missing" in str(caught.value)
    assert "1 wrong_type (first: train.jsonl line 2: " in str(caught.value)
    assert "$.turns[0].text" in str(caught.value)
