"""Records that are too large or hide others are rejected or read, and always reported."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from d2i.cluster import Session
from d2i.config import DialogConfig, FetchConfig
from d2i.corpora import read_instances
from d2i.corpora.jsonl import Jsonl
from d2i.corpora.records import Dialog
from d2i.corpus_analysis.survey import survey_split
from d2i.errors import ConfigError, DataError
from d2i.fetch.rate_limiter import create_shared_limiter
from d2i.fetch.sources import ImageSource, NetworkPolicy, build_rate_limiter
from d2i.images.decode import ImageRejectedError
from d2i.images.image_files import read_image
from d2i.preprocess.plan.planner import PlanRequest, make_plan
from d2i.recipes import load_recipe
from tests.servers import WebServer, running


def read(
    corpus: str, source: Path, split: str = "train", **options: Any
) -> tuple[int, Counter[str]]:
    issues: Counter[str] = Counter()
    instances = read_instances(
        corpus, source, split, on_problem=lambda p: issues.update([p.reason]), **options
    )
    return sum(1 for _ in instances), issues


def write_chats(source: Path, *records: dict[str, Any], name: str = "train.jsonl") -> Path:
    source.mkdir(exist_ok=True)
    (source / name).write_text("\n".join(map(json.dumps, records)))
    return source


def mmdialog_record(number: int) -> dict[str, Any]:
    turn = {"turn": [{"__TEXT__": "a" * 3000}, {"__MEDIA__": "1"}]}
    return {"conversation_id": number, "conversation": [turn]}


@pytest.mark.parametrize("joiner", [",", ",\n"])
def test_lost_brackets_in_array_skip_only_their_records(tmp_path: Path, joiner: str) -> None:
    """Each search spans the maximum record size, far more bytes than were read by then."""
    records = [json.dumps(mmdialog_record(number)) for number in range(3000)]
    broken = range(5, 65, 5)
    for number in broken:
        records[number] = records[number][:-1]
    (tmp_path / "train").mkdir()
    path = tmp_path / "train" / "conversations.json"
    path.write_text(f"[{joiner.join(records)}]")
    num_read, issues = read("mmdialog", tmp_path)
    assert num_read == len(records) - len(broken)
    assert issues.total() == len(broken)


def test_unreadable_rest_is_error_unless_max_broken_allows(tmp_path: Path) -> None:
    """All on one line after a value that is no object: nothing shows how the records start."""
    records = [json.dumps(mmdialog_record(number)) for number in range(50)]
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "conversations.json").write_text(f"[null,{','.join(records)}]")
    with pytest.raises(
        DataError, match=r"no record could be read: .*the last \d+ bytes are skipped"
    ):
        read("mmdialog", tmp_path)
    num_read, issues = read("mmdialog", tmp_path, max_broken=1.0)
    assert num_read == 0
    assert issues["too_many_broken"] == 1


@pytest.mark.parametrize("num_turns", [1, 2000])
def test_dialog_with_too_many_images_is_skipped(tmp_path: Path, num_turns: int) -> None:
    silent = [{"text": ""}] * (num_turns - 1)
    many = {"id": 1, "turns": [*silent, {"text": "a", "images": ["a"] * 20_000}]}
    source = write_chats(
        tmp_path / "chats", many, {"id": 2, "turns": [{"text": "b", "images": ["b"]}]}
    )
    num_read, issues = read("jsonl", source)
    assert num_read == 1
    assert issues["too_large"] == 1


def test_survey_makes_instances_of_dialog_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once for every sampled image, which is quadratic in a dialog of many images."""
    made = Jsonl.instances
    num_calls = Counter[int]()

    def count(corpus: Jsonl, dialog: Dialog, *args: Any) -> Any:
        num_calls[len(dialog.images)] += 1
        return made(corpus, dialog, *args)

    monkeypatch.setattr(Jsonl, "instances", count)
    for num_images in (1, 300):
        source = write_chats(
            tmp_path / f"chats-{num_images}",
            {"id": 1, "turns": [{"text": "a", "images": ["a"] * num_images}]},
        )
        found = survey_split(
            "jsonl", str(source), "train", DialogConfig(), num_sampled=2000, on_dialog=lambda: None
        )
        assert found.num_instances == num_images
        assert found.lengths.num_sampled == num_images
    assert num_calls[300] == num_calls[1]


def test_overlong_text_is_skipped(tmp_path: Path) -> None:
    long = {"id": 1, "turns": [{"text": "a\u0301" * 40_000, "images": ["a"]}]}
    num_read, issues = read("jsonl", write_chats(tmp_path / "chats", long), max_broken=1.0)
    assert (num_read, issues["too_large"]) == (0, 1)


@pytest.mark.parametrize("url", ["http://[", "https://[::1", "http://a]b/c", "http://a\u2100b/"])
def test_unparsable_url_is_bad_image_ref(tmp_path: Path, url: str) -> None:
    record = {
        "dialogue_id": 1,
        "dialogue": [
            {"message": "hi", "share_photo": False, "user_id": 0},
            {"message": "", "share_photo": True, "user_id": 0},
        ],
        "photo_id": "train/00",
        "photo_url": url,
    }
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.json").write_text(json.dumps([record]))
    num_read, issues = read("photochat", tmp_path, repeated="unique")
    assert num_read == 1
    assert issues == {"bad_image_ref": 1}


def test_long_ids_and_image_names_take_bounded_memory(tmp_path: Path) -> None:
    """All ids and names of a split are remembered, to find duplicates."""
    turns = [{"text": "a", "images": ["b" * 1000 + "{}"]}]
    line = json.dumps({"id": "c" * 1000 + "{}", "turns": turns}).replace("{}", "%d") + "\n"
    with (tmp_path / "train.jsonl").open("w") as file:
        file.writelines(line % (number, number) for number in range(6000))
    tracemalloc.start()
    num_read, issues = read("jsonl", tmp_path, repeated="unique")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (num_read, issues) == (6000, {})
    assert peak_bytes < 4 << 20


def test_split_under_two_names_raises(tmp_path: Path) -> None:
    record = {"id": 1, "turns": [{"text": "a", "images": ["a"]}]}
    source = write_chats(tmp_path / "chats", record, name="valid.jsonl")
    write_chats(source, record, name="dev.jsonl")
    with pytest.raises(DataError, match=r"valid\.jsonl and dev\.jsonl"):
        read("jsonl", source, "valid")
    for name in ("valid", "val"):
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match="valid and val"):
        read("mmdialog", tmp_path, "valid")


def test_tool_message_image_is_no_image_issue(tmp_path: Path) -> None:
    part = {"type": "image_url", "image_url": {"url": "a.jpg"}}
    messages = [{"role": "user", "content": "draw"}, {"role": "tool", "content": [part]}]
    num_read, issues = read("jsonl", write_chats(tmp_path / "c", {"id": 1, "messages": messages}))
    assert (num_read, issues) == (0, {"no_image": 1})


# The first bytes of a JPEG.
JPEG = b"\xff\xd8\xff"


def test_image_name_cannot_escape_mirror_path(tmp_path: Path) -> None:
    """`%` and `#` belong to the name, on a server as in a directory."""
    names = ["%2e%2e/secret/x.jpg", "photos/..%2f..%2fsecret/x.jpg", "photos/1.jpg#x", "50%.jpg"]
    turns = [{"text": "a", "images": names}]
    source = write_chats(tmp_path / "chats", {"id": 1, "turns": turns})
    refs = [i.image_ref for i in read_instances("jsonl", source, "train")]
    assert [ref.value[0] for ref in refs] == names
    (source / "50%.jpg").write_bytes(b"half")
    assert read_image(str(source), "50%.jpg", 100) == b"half"
    paths = ("/secret/x.jpg", "/pub/photos/1.jpg", "/pub/50%25.jpg")
    with running(
        WebServer("127.0.0.1", {path: lambda h: h.send(200, JPEG) for path in paths})
    ) as s:
        host = f"127.0.0.1:{s.port}"
        config = FetchConfig(mirror=f"http://{host}/pub/{{path}}")
        network_policy = NetworkPolicy(allow_hosts=frozenset({host}))
        mirror = ImageSource(
            "",
            config,
            network_policy,
            create_shared_limiter(build_rate_limiter(config, network_policy), Session(0)),
        )
        found = dict(mirror.fetch(refs, lambda ref, one: (ref.value[0], one.data)))
        assert found == dict.fromkeys(names[:3]) | {"50%.jpg": JPEG}
        assert all(path.startswith("/pub/") for path in s.asked)


@pytest.mark.parametrize("root", ["{}/p", "simplecache::{}/p", "{}/p.tar", "tar://p::{}/p.tar"])
def test_http_url_as_image_root_raises(root: str) -> None:
    """A redirect from it would bypass the SSRF guard."""
    with running(WebServer("127.0.0.1", {})) as web:
        with pytest.raises(ConfigError, match=r"fetch\.mirror"):
            read_image(root.format(f"HTTP://127.0.0.1:{web.port}"), "1.jpg", 100)
        assert not web.asked


def test_named_pipe_as_image_is_read_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.jpg")
    with pytest.raises(ImageRejectedError) as caught:
        read_image(str(tmp_path), "p.jpg", 1000)
    assert caught.value.reason == "read_error"


def test_plan_is_remade_when_corpus_changes(tmp_path: Path) -> None:
    record = {"id": 1, "turns": [{"text": "a", "images": ["a"]}]}
    source, out = write_chats(tmp_path / "chats", record), str(tmp_path / "out")
    request = PlanRequest("jsonl", str(source), "train", load_recipe("demo"))
    assert make_plan(request, out).num_instances == 1
    write_chats(source, record, record | {"id": 2})
    assert make_plan(request, out).num_instances == 2
