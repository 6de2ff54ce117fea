"""Corpus readers: released layouts, unusual records, and damaged or hostile input."""

import io
import json
import logging
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2i.config import ImageConfig, TextConfig
from d2i.corpora import RecordIssue, build_corpus, json_stream, read_instances, splits
from d2i.corpora.inline import InlineImages
from d2i.corpora.json_stream import read_objects
from d2i.corpora.records import RecordError
from d2i.dialog import ImageRef, Instance, Turn, linearize
from d2i.errors import ConfigError, DataError
from d2i.images.decode import ImageRejectedError, decode_image
from d2i.images.image_files import read_image
from d2i.prompt_text import context_text
from tests.shared import SHARED, needs_shared

MMDIALOG = SHARED / "data" / "mmdialog"
PHOTOCHAT = SHARED / "data" / "photochat"

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
# Most start with the same field, as real records do, but not all.
RECORD = st.builds(lambda body: {"id": 1, "body": body}, JSON) | st.builds(
    lambda body: {"body": body, "id": 1}, JSON
)
RECORDS = st.lists(RECORD, min_size=1, max_size=6)
FORMS: dict[str, Callable[[Any], str]] = {
    "lines": lambda records: "\n".join(map(json.dumps, records)) + "\n",
    "spaced lines": lambda records: "\n\n\n".join(map(json.dumps, records)) + "\n\n",
    "windows lines": lambda records: "\ufeff" + "\r\n\r\n".join(map(json.dumps, records)),
    "array": json.dumps,
    "indented array": lambda records: json.dumps(records, indent=2, ensure_ascii=False),
    "flat array": lambda records: json.dumps(records, indent=0),
    "array of lines": lambda records: "[" + ",\n".join(map(json.dumps, records)) + "]",
    "run together": lambda records: "".join(map(json.dumps, records)),
    "indented": lambda records: "\n".join(json.dumps(r, indent=4) for r in records),
}


def ignore(*args: object) -> None:
    """Take a record issue and do nothing with it."""


def read(data: bytes, **limits: int) -> tuple[list[Any], list[RecordIssue]]:
    issues: list[RecordIssue] = []
    values = [v for _, v in read_objects(io.BytesIO(data), "f", issues.append, **limits)]
    return values, issues


@given(RECORDS, st.sampled_from(sorted(FORMS)), st.sampled_from([1, 7, 64, 1 << 20]))
def test_read_objects_round_trips_every_json_layout(
    records: list[dict[str, Any]], form: str, chunk_bytes: int
) -> None:
    assert read(FORMS[form](records).encode(), chunk_bytes=chunk_bytes) == (records, [])


@given(RECORDS, st.sampled_from(sorted(FORMS)), st.data())
def test_truncated_file_gives_whole_records_and_an_issue(
    records: list[dict[str, Any]], form: str, data: st.DataObject
) -> None:
    text = FORMS[form](records).rstrip().encode()
    cut = text[: data.draw(st.integers(0, len(text) - 1))]
    values, issues = read(cut)
    assert values == records[: len(values)]
    if len(values) < len(records) and cut.count(b'"body"') > len(values):
        assert issues
    if "array" in form:
        assert issues


@given(RECORDS, st.sampled_from(sorted(FORMS)), st.binary(max_size=12), st.data())
def test_read_objects_never_raises_on_damaged_json(
    records: list[dict[str, Any]], form: str, noise: bytes, data: st.DataObject
) -> None:
    text = FORMS[form](records).encode()
    at = data.draw(st.integers(0, len(text)))
    read(text[:at] + noise + text[at + data.draw(st.integers(0, 8)) :])


@given(st.binary(max_size=200))
def test_read_objects_never_raises_on_random_bytes(data: bytes) -> None:
    read(data)


BROKEN = {
    "lost quotation mark": ('{"id": 3, "body": "x}', "invalid_json"),
    "lost bracket": ('{"id": 3, "body": {"x": 1}', "too_large|truncated|invalid_json"),
    "line end in a string": ('{"id": 3, "body": "x\ny"}', "invalid_json"),
    "not a value": ('{"id": 3, "body": nope}', "invalid_json"),
    "no object": ("hello", "invalid_json"),
}


@pytest.mark.parametrize("broken", sorted(BROKEN))
@pytest.mark.parametrize("separator", ["\n", ",\n  "])
def test_broken_record_does_not_lose_its_neighbours(broken: str, separator: str) -> None:
    text, reasons = BROKEN[broken]
    whole = [json.dumps({"id": number, "body": {"x": ["y"]}}) for number in range(6)]
    body = separator.join([*whole[:3], text, *whole[4:]])
    if separator != "\n":
        body = f"[{body}]"
    values, issues = read(body.encode())
    assert [value["id"] for value in values] == [0, 1, 2, 4, 5]
    assert issues[0].reason in reasons.split("|")
    if separator != "\n":
        assert issues[0].where == f"f byte {body.index(text)}"


def test_invalid_utf8_skips_only_its_record() -> None:
    data = b'{"id": 0}\n{"id": "\xff"}\n{"id": 2}\n'
    values, issues = read(data)
    assert values == [{"id": 0}, {"id": 2}]
    assert [(p.reason, p.where) for p in issues] == [("invalid_utf8", "f line 2")]


REPAIRED = {
    "[NaN, -Infinity, Infinity]": ([None] * 3, "-Infinity is read as null, Infinity"),
    r'"a\ud83d"': ("a\ufffd", "1 halves of surrogate pairs"),
    r'"\udc00\ud83d\ude00 \\ud83d NaN"': ("\ufffd\U0001f600 \\ud83d NaN", "1 halves"),
}


@pytest.mark.parametrize("text", REPAIRED)
@pytest.mark.parametrize("form", ["lines", "array", "indented array", "run together"])
def test_nonstandard_json_is_repaired_and_reported(form: str, text: str) -> None:
    """As written by Python's `json.dumps` and by `JSON.stringify`."""
    value, detail = REPAIRED[text]
    records = [{"id": 0}, {"id": 1, "body": "here"}, {"id": 2}]
    values, issues = read(FORMS[form](records).replace('"here"', text).encode())
    assert values == [{"id": 0}, {"id": 1, "body": value}, {"id": 2}]
    assert [issue.reason for issue in issues] == ["repaired"]
    assert detail in issues[0].detail


@pytest.mark.parametrize("form", ["lines", "array", "indented array", "run together"])
def test_object_over_size_limit_is_skipped(form: str) -> None:
    records = [{"id": 0}, {"id": 1, "body": ["x" * 50] * 100}, {"id": 2}]
    data = FORMS[form](records).encode()
    values, issues = read(data, chunk_bytes=64, max_record_bytes=1000)
    assert values == [{"id": 0}, {"id": 2}]
    assert [issue.reason for issue in issues] == ["too_large"]


def test_reading_stops_after_max_resyncs() -> None:
    data = b"[" + b'{"id": ["a",' * (json_stream.MAX_RESYNCS + 10) + b'{"id": 1}]'
    values, issues = read(data)
    assert values == []
    assert issues[-1].reason == "too_many_broken"
    assert len(issues) <= json_stream.MAX_RESYNCS + 2


ODD_FIRST = [{"id": 0, "body": ["x" * 100]}, *({"body": ["y" * 100], "id": n} for n in range(999))]


@pytest.mark.parametrize("broken", [0, 1, 2, 500])
def test_records_lost_after_missing_bracket_count_as_broken(broken: int) -> None:
    """No other record starts like the first, and brackets balance again by chance near the end."""
    texts = [json.dumps(record) for record in ODD_FIRST]
    texts[broken] = texts[broken][:-1]
    texts[-3] += "}"
    values, issues = read(f"[{', '.join(texts)}]".encode())
    num_lost = len(ODD_FIRST) - len(values)
    assert num_lost > 450
    if broken:
        assert sum(p.num_records for p in issues) == pytest.approx(num_lost, rel=0.05)
    # With no record read before it, the length of a record is unknown.
    assert sum(issue.num_records for issue in issues) > 50
    assert "bytes are skipped" in issues[0].detail


def test_rest_lost_after_missing_bracket_is_error(tmp_path: Path) -> None:
    records = [PLAIN | {"id": n} for n in range(3000)]
    texts = [json.dumps({key: record[key] for key in sorted(record)}) for record in records]
    texts[0] = json.dumps({"turns": PLAIN["turns"], "id": 0})
    texts[1000] = texts[1000][:-1]
    texts[-3] += "}"
    (tmp_path / "train.jsonl").write_text(f"[{','.join(texts)}]")
    with pytest.raises(DataError, match=r"broken of \d+ records"):
        list(read_instances("jsonl", tmp_path, "train", on_problem=ignore))
    assert len(instances("jsonl", tmp_path, "train", max_broken=1.0)[0]) == 1002 * 3


def test_long_broken_line_skips_only_itself() -> None:
    long = json.dumps({"id": 1, "body": ["x" * 50] * 3000})
    for broken in (
        long[:-1],
        long.replace("x", "\\x", 1),
        long[: len(long) // 2],
        '{"a": ' * 20 + long,
    ):
        lines = [json.dumps({"id": 0}), broken, json.dumps({"id": 2})]
        values, issues = read("\n".join(lines).encode())
        assert [value["id"] for value in values if value["id"] != 1] == [0, 2]
        assert {(issue.where, issue.num_records) for issue in issues} == {("f line 2", 1)}
        assert "too_many_broken" not in {issue.reason for issue in issues}


def test_objects_nested_in_broken_line_are_not_records(tmp_path: Path) -> None:
    """Neither an earlier version of the conversation, nor the calls of a tool."""
    old = {"id": 0, "turns": [{"text": "old", "images": ["old.jpg"]}]}
    broken = json.dumps({"id": 1, "bad": "nope", "parent": old} | {"turns": PLAIN["turns"]})
    calls = json.dumps({"id": 2, "calls": [{"id": n} for n in range(5)], "bad": "nope"})
    lines = [broken, calls, calls[:-1], calls.replace('"calls"', '"calls')]
    lines = [json.dumps(CHAT), *lines, *(json.dumps(PLAIN | {"id": n}) for n in range(9, 14))]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(lines).replace('"nope"', "nope"))
    found, issues = instances("jsonl", tmp_path, "train")
    assert {i.dialog_id for i in found} == {"2", *map(str, range(9, 14))}
    assert [(p.where, p.num_records) for p in issues] == [
        (f"train.jsonl line {number}", 1) for number in range(2, 6)
    ]


def test_concatenated_objects_are_read_up_to_unclosed_one() -> None:
    whole = '{"id": 1}, {"id": nope} {"id": 2}'
    lines = ['{"id": 0}', whole, '[{"id": 3}, {"id": 4', '[{"id": 5}', '{"id": 6}']
    values, issues = read("\n".join(lines).encode())
    assert [value["id"] for value in values] == [0, 1, 2, 3, 5, 6]
    assert [(p.reason, p.where) for p in issues] == [
        ("invalid_json", "f line 2"),
        ("truncated", "f line 3"),
        ("truncated", "f line 4"),
    ]


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("form", ["array", "indented array", "run together"])
@pytest.mark.parametrize("inner", [{"id": 7}, [{"id": 7}]], ids=["value", "list"])
def test_objects_nested_in_broken_object_are_not_records(
    form: str, number: int, inner: Any
) -> None:
    records: list[Any] = [{"id": n, "bad": 0, "inner": inner} for n in range(5)]
    records[number]["bad"] = "nope"
    data = FORMS[form](records).replace('"nope"', "nope").encode()
    values, issues = read(data)
    assert [value["id"] for value in values] == [n for n in range(5) if n != number]
    assert [issue.reason for issue in issues] == ["invalid_json"]


FIRST_BROKEN = {
    "key": lambda text: text.replace('"conversation_id"', '"conversation_\\x"', 1),
    "quotation mark": lambda text: text.replace('"conversation_id"', '"conversation_id', 1),
    "bracket": lambda text: text[:-1],
    "value": lambda text: text.replace(": 0,", ": nope,", 1),
}


@pytest.mark.parametrize("damage", sorted(FIRST_BROKEN))
@pytest.mark.parametrize("joiner", [",", ",\n"])
def test_damaged_first_record_is_reported_or_error(
    tmp_path: Path, damage: str, joiner: str
) -> None:
    texts = [json.dumps(mmdialog([text("a"), media("1")], number=n)) for n in range(12)]
    texts[0] = FIRST_BROKEN[damage](texts[0])
    path = tmp_path / "train" / "conversations.json"
    path.parent.mkdir()
    path.write_text(f"[{joiner.join(texts)}]")
    found, issues = instances("mmdialog", tmp_path, "train")
    assert issues
    if len(found) < 11:
        assert found == []
        with pytest.raises(DataError):
            list(read_instances("mmdialog", tmp_path, "train", on_problem=ignore))
    # Lost only if nothing marks the beginning of the second record.
    assert len(found) == 11 or (joiner == "," and damage in ("key", "quotation mark"))


@pytest.mark.parametrize("at", [0, 3, 5])
def test_line_over_size_limit_skips_only_itself(at: int) -> None:
    records = [{"id": n, "body": "x" * (5000 if n == at else 9)} for n in range(6)]
    data = FORMS["lines"](records).encode()
    for chunk_bytes in (64, 1 << 20):
        values, issues = read(data, chunk_bytes=chunk_bytes, max_record_bytes=3000)
        assert [value["id"] for value in values] == [n for n in range(6) if n != at]
        assert [(p.reason, p.num_records) for p in issues] == [("too_large", 1)]


def test_oversized_line_counts_records_it_may_hold() -> None:
    data = b'{"id": 0}\n' + b"[" + b'{"id": 1},' * 1000 + b'{"id": 1}]\n{"id": 2}\n'
    values, issues = read(data, chunk_bytes=64, max_record_bytes=1000)
    assert [value["id"] for value in values] == [0, 2]
    assert [(p.reason, p.num_records) for p in issues] == [("too_large", 10)]


@pytest.mark.parametrize("body", ['"abc', '"ab\\', '"\u00e9', "[1, ", "nul", ""])
def test_cut_last_line_is_truncated_issue(body: str) -> None:
    data = f'{{"id": 0}}\n{{"id": 1, "body": {body}'.encode()
    for cut in (data, data[:-1]):
        values, issues = read(cut)
        assert (values, [issue.reason for issue in issues]) == ([{"id": 0}], ["truncated"])


def test_deep_nesting_is_record_issue() -> None:
    values, issues = read(b'{"a":' * 100_000 + b"1" + b"}" * 100_000)
    assert values == []
    assert issues[0].reason == "invalid_json"


def test_empty_file_is_record_issue() -> None:
    assert [issue.reason for issue in read(b" \n ")[1]] == ["empty_file"]


class Endless(io.RawIOBase):
    """Stream an array of one repeated record, `num_bytes` long, without holding it in memory."""

    def __init__(self, record: bytes, num_bytes: int) -> None:
        self.block = record + b","
        self.left = num_bytes // len(self.block)
        self.head = b"["

    def read(self, size: int = -1) -> bytes:
        num_blocks = min(self.left, max(1, size // len(self.block)))
        self.left -= num_blocks
        head, self.head = self.head, b""
        return head + self.block * num_blocks


def test_read_objects_memory_does_not_grow_with_file() -> None:
    record = json.dumps({"id": 1, "negatives": ["n" * 40] * 2000}).encode()
    stream: Any = Endless(record, 40 << 20)
    tracemalloc.start()
    count = sum(1 for _ in read_objects(stream, "f", ignore))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count > 400
    assert peak_bytes < 8 << 20


def instances(
    corpus: str, source: Path, split: str, *, max_broken: float = 1.0, **options: Any
) -> tuple[list[Instance], list[RecordIssue]]:
    issues: list[RecordIssue] = []
    options["max_broken"] = max_broken
    found = list(read_instances(corpus, source, split, on_problem=issues.append, **options))
    assert len({instance.key for instance in found}) == len(found)
    return found, issues


def reasons(issues: list[RecordIssue]) -> Counter[str]:
    return Counter(issue.reason for issue in issues)


@needs_shared
@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_mmdialog_counts_match_sample(split: str) -> None:
    expected = json.loads((MMDIALOG / "EXPECTED.json").read_bytes())[split]
    every, issues = instances("mmdialog", MMDIALOG, split, repeated="all")
    assert (len(every), issues) == (expected["image_occurrences"], [])
    unique, _ = instances("mmdialog", MMDIALOG, split, repeated="unique")
    assert len(unique) == expected["unique_images"]
    assert len({instance.image_ref for instance in unique}) == len(unique)
    default, _ = instances("mmdialog", MMDIALOG, split)
    assert default == (every if split == "train" else unique)


@needs_shared
@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_mmdialog_own_turn_exclude_counts_empty_contexts(split: str) -> None:
    expected = json.loads((MMDIALOG / "EXPECTED.json").read_bytes())[split]
    num_empty = expected["occurrences_with_text_free_context_if_same_turn_text_is_dropped"]
    found, issues = instances("mmdialog", MMDIALOG, split, repeated="all", own_turn="exclude")
    assert len(found) == expected["image_occurrences"] - num_empty
    assert reasons(issues) == Counter({"empty_context": num_empty} if num_empty else {})


@needs_shared
def test_mmdialog_array_reads_as_same_corpus(tmp_path: Path) -> None:
    array = (MMDIALOG / "variants" / "array" / "conversations.json").read_bytes()
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "simple_conversations.json").write_bytes(array)
    assert instances("mmdialog", tmp_path, "train") == instances("mmdialog", MMDIALOG, "train")


LAYOUTS = [
    *((form, name, "conversations.json") for form in sorted(FORMS) for name in ("train", "test")),
    *((form, name, "a.conversations.txt") for form in sorted(FORMS) for name in ("val", "dev")),
    ("lines", "valid", "conversations.jsonl"),
    ("indented", "validation", "simple_conversations.json"),
]


@needs_shared
@pytest.mark.parametrize("elsewhere", [False, True], ids=["beside", "elsewhere"])
@pytest.mark.parametrize(("form", "directory", "name"), LAYOUTS)
def test_mmdialog_counts_match_sample_in_every_layout(
    tmp_path: Path, form: str, directory: str, name: str, elsewhere: bool
) -> None:
    split = directory if directory in ("train", "test") else "valid"
    expected = json.loads((MMDIALOG / "EXPECTED.json").read_bytes())[split]
    lines = (MMDIALOG / split / "conversations.json").read_text(encoding="utf-8").splitlines()
    path = tmp_path / directory / name
    path.parent.mkdir()
    path.write_text(FORMS[form]([json.loads(line) for line in lines if line]), encoding="utf-8")
    image_dir = MMDIALOG / split if elsewhere else path.parent
    if not elsewhere:
        for image in (MMDIALOG / split).glob("*.jpg"):
            (path.parent / image.name).symlink_to(image)
    options = {"image_root": str(image_dir)} if elsewhere else {}
    every, issues = instances("mmdialog", tmp_path, split, repeated="all", **options)
    unique, _ = instances("mmdialog", tmp_path, split, repeated="unique", **options)
    assert (len(every), issues) == (expected["image_occurrences"], [])
    assert len(unique) == expected["unique_images"]
    root = image_dir if elsewhere else tmp_path
    failures = Counter(failure_of(root / instance.image_ref.value[0]) for instance in every)
    assert failures[None] == expected["usable_instances"]
    assert failures["missing_file"] == expected["missing_files"]
    assert failures["decode_error"] == expected["truncated_files"]


def failure_of(path: Path) -> str | None:
    """Return the reason why an image cannot be used, or None."""
    try:
        decode_image(read_image(str(path.parent), path.name, 1 << 20), ImageConfig())
    except ImageRejectedError as error:
        return error.reason
    return None


@needs_shared
def test_photochat_reads_both_releases() -> None:
    assert splits("photochat", PHOTOCHAT) == ["train", "test"]
    train, train_problems = instances("photochat", PHOTOCHAT, "train")
    test, test_problems = instances("photochat", PHOTOCHAT, "test")
    assert train_problems == test_problems == []
    assert [instance.dialog_id for instance in train] == ["492", "494"]
    newer, _, older = test
    assert [instance.key for instance in test] == ["test-7-9-0", "test-8-10-0", "test-996-11-0"]
    assert newer.image_ref.value == (
        "https://open-images-dataset.s3.amazonaws.com/test/5048a37f10cf2d91.jpg",
        "https://farm2.staticflickr.com/5492/12205374334_c72647db04_o.jpg",
    )
    assert (newer.description, newer.labels) == ("Objects in the photo: Belt", ("Belt",))
    assert len(older.image_ref.value) == 1
    assert older.labels == ("Glasses", "Jeans", "Face", "Man")


@needs_shared
def test_photochat_dialog_is_cut_at_first_of_two_shares() -> None:
    last = instances("photochat", PHOTOCHAT, "test")[0][-1]
    assert len(last.context) == last.turn == 11
    assert last.context[0] == Turn(1, "Hello friend, haven't talked to you in a long time")
    assert "Awesome" not in linearize(last.context)


def mmdialog(*turns: list[dict[str, Any]], number: Any = 0) -> dict[str, Any]:
    return {
        "conversation_id": number,
        "conversation": [{"turn": turn} for turn in turns],
        "negative_candidate_texts": ["never kept"],
    }


def write_lines(path: Path, *records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


def text(value: Any) -> dict[str, Any]:
    return {"__TEXT__": value}


def media(value: Any) -> dict[str, Any]:
    return {"__MEDIA__": value}


@pytest.mark.parametrize(
    ("directory", "name"), [("val", "a.conversations_01.txt"), ("dev", "conversations.jsonl")]
)
def test_mmdialog_accepts_other_split_and_file_names(
    tmp_path: Path, directory: str, name: str
) -> None:
    write_lines(tmp_path / directory / name, mmdialog([text("a"), media("-1")]))
    assert splits("mmdialog", tmp_path) == ["valid"]
    (found,), _ = instances("mmdialog", tmp_path, "validation")
    assert (found.split, found.key) == ("valid", "valid-0-0-0")
    assert found.image_ref == ImageRef("file", (f"{directory}/-1.jpg",))


@pytest.mark.parametrize("name", ["conversations_2.json", "conversations-00001-of-2.jsonl"])
def test_mmdialog_reads_all_part_files(tmp_path: Path, name: str) -> None:
    for number, part in enumerate(["conversations.json", name]):
        record = mmdialog([text("a"), media("-1")], number=number)
        write_lines(tmp_path / "train" / part, record)
    (tmp_path / "train/conversations").mkdir()
    write_lines(tmp_path / "train/conversations.json.bak", mmdialog([text("a")]))
    found, issues = instances("mmdialog", tmp_path, "train")
    assert (sorted(i.dialog_id for i in found), issues) == (["0", "1"], [])


def test_mmdialog_image_root_may_be_another_directory(tmp_path: Path) -> None:
    write_lines(tmp_path / "text/val/conversations.json", mmdialog([text("a"), media("-1")]))
    (tmp_path / "split/valid").mkdir(parents=True)
    (tmp_path / "flat").mkdir()
    for root, path in [("split", "valid/-1.jpg"), ("flat", "-1.jpg")]:
        (found,), _ = instances(
            "mmdialog", tmp_path / "text", "valid", image_root=str(tmp_path / root)
        )
        assert found.image_ref.value == (path,)


def test_mmdialog_images_in_one_turn(tmp_path: Path) -> None:
    turn = [text("a :red_heart: b"), media("1"), media(2), text("c")]
    write_lines(tmp_path / "train/conversations.json", mmdialog([text("x")], turn, [text("y")]))
    every, _ = instances("mmdialog", tmp_path, "train")
    assert [(found.turn, found.image) for found in every] == [(1, 0), (1, 1)]
    assert linearize(every[0].context) == "# x # a :red_heart: b c"
    first, _ = instances("mmdialog", tmp_path, "train", images_in_turn="first", emoji="drop")
    assert linearize(first[0].context) == "# x # a b c"
    assert len(first) == 1


def test_emoji_drop_keeps_other_colons(tmp_path: Path) -> None:
    stay = "at 10:30:45 http://x:80/a note: yes std::vector::iterator https://x.com/p:q:r :no_name:"
    line = f":1st_place_medal::Côte_d\u2019Ivoire: {stay}:red_heart:"
    write_lines(tmp_path / "train/conversations.json", mmdialog([text(line), media("1")]))
    (found,), _ = instances("mmdialog", tmp_path, "train", emoji="drop")
    assert linearize(found.context, "space") == stay


@pytest.mark.parametrize("key", ["../1", "/etc/passwd", "a/b", "", ".", "a\\b", "1\x00", "1.jpg"])
def test_media_key_with_path_characters_is_record_issue(tmp_path: Path, key: str) -> None:
    write_lines(
        tmp_path / "train/conversations.json", mmdialog([text("a"), media(key)], [media("7")])
    )
    found, issues = instances("mmdialog", tmp_path, "train")
    assert [instance.image_ref.value for instance in found] == [("train/7.jpg",)]
    assert reasons(issues) == Counter({"bad_image_ref": 1})


def test_broken_records_are_issues_and_rest_is_read(tmp_path: Path) -> None:
    good = mmdialog([text("a"), media("1")], number=1)
    write_lines(
        tmp_path / "train/conversations.json",
        good,
        good,
        {"conversation_id": 2},
        {"conversation": []},
        mmdialog([text(None)], number=3),
        mmdialog([{"__SOUND__": "x"}], number=4),
        mmdialog(*[[text("a")]] * 3000, number=5),
        ["no object"],
        mmdialog([media("1")], number=6),
        mmdialog([text("a"), media("1")], number=True),
        mmdialog([text("a"), media("1")], number="7/../8"),
    )
    found, issues = instances("mmdialog", tmp_path, "train")
    assert [instance.dialog_id for instance in found] == ["1", "7/../8"]
    assert [(issue.reason, issue.where.rpartition(" ")[2]) for issue in issues] == [
        ("duplicate_dialog_id", "2"),
        ("missing_field", "3"),
        ("missing_field", "4"),
        ("wrong_type", "5"),
        ("missing_field", "6"),
        ("too_large", "7"),
        ("wrong_type", "8"),
        ("empty_context", "9"),
        ("wrong_type", "10"),
    ]


def photochat(**changes: Any) -> dict[str, Any]:
    record = {
        "dialogue": [
            {"message": "secret", "share_photo": False, "user_id": 0},
            {"message": "", "share_photo": True, "user_id": 0},
        ],
        "dialogue_id": 1,
        "photo_description": "The photo has your son Al. Objects in the photo: Boy, Human face",
        "photo_url": "https://farm1.staticflickr.com/1_o.jpg",
        "photo_id": "train/00ff",
    }
    return {key: value for key, value in (record | changes).items() if value is not ...}


@pytest.mark.parametrize(
    ("changes", "num_urls", "found_reasons"),
    [
        ({}, 2, []),
        ({"photo_id": ...}, 1, []),
        ({"photo_url": None}, 1, []),
        ({"photo_id": "../../x"}, 1, ["bad_image_ref"]),
        ({"photo_url": "file:///etc/passwd"}, 1, ["bad_image_ref"]),
        ({"photo_url": ..., "photo_id": ...}, 0, ["missing_field"]),
        ({"photo_url": 5}, 0, ["wrong_type"]),
        ({"dialogue": []}, 0, ["no_image"]),
        ({"dialogue": [{"message": "", "share_photo": True, "user_id": 0}]}, 0, ["empty_context"]),
        ({"dialogue": [{"message": "a", "share_photo": 1, "user_id": 0}]}, 0, ["wrong_type"]),
        ({"dialogue": [{"message": "a", "share_photo": True, "user_id": 999}]}, 0, ["wrong_type"]),
    ],
)
def test_photochat_record_variants(
    tmp_path: Path, changes: dict[str, Any], num_urls: int, found_reasons: list[str]
) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "dev_00.json").write_text(json.dumps([photochat(**changes)], indent=2))
    found, issues = instances("photochat", tmp_path, "valid")
    assert [len(instance.image_ref.value) for instance in found] == [num_urls] * bool(num_urls)
    assert [issue.reason for issue in issues] == found_reasons
    assert all("secret" not in issue.detail for issue in issues)
    assert all(instance.labels == ("Boy", "Human face") for instance in found)


def test_photochat_open_images_url_template(tmp_path: Path) -> None:
    write_lines(tmp_path / "train/train_00.json", [photochat()])
    template = "http://mirror.example/{photo_id}"
    (found,), _ = instances("photochat", tmp_path, "train", open_images_url=template)
    assert found.image_ref.value[0] == "http://mirror.example/train/00ff"
    with pytest.raises(ConfigError, match="photo_id"):
        read_instances("photochat", tmp_path, "train", open_images_url="http://mirror.example")


def test_urls_that_differ_in_query_are_distinct_images(tmp_path: Path) -> None:
    made = [photochat(dialogue_id=n, photo_id=f"train/0{n}", photo_url=None) for n in range(3)]
    made += [photochat(dialogue_id=n, photo_url=f"https://x.example/1?{n}") for n in (3, 4)]
    write_lines(tmp_path / "train/train_00.json", made)
    template = "http://mirror.example/get?id={photo_id}"
    options = {"repeated": "unique", "open_images_url": template}
    found, _ = instances("photochat", tmp_path, "train", **options)
    assert [instance.dialog_id for instance in found] == ["0", "1", "2", "3"]


PLAIN = {
    "id": "a b",
    "turns": [
        {"speaker": 3, "text": "see", "images": ["p/1.jpg", "https://x.example/2.jpg"]},
        {"text": "nice"},
        {"speaker": 3, "images": ["3.jpg"]},
    ],
}
CHAT = {
    "id": 2,
    "messages": [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "draw"},
        {"role": "assistant", "content": None},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "here"},
                {"type": "image_url", "image_url": {"url": "https://x.example/4.png"}},
            ],
        },
        {"role": "user", "content": "thanks"},
    ],
}


def test_jsonl_reads_turns_and_messages(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", PLAIN, CHAT)
    found, issues = instances("jsonl", tmp_path, "train")
    assert issues == []
    assert [(i.dialog_id, i.turn, i.image, i.image_ref) for i in found] == [
        ("a b", 0, 0, ImageRef("file", ("p/1.jpg",))),
        ("a b", 0, 1, ImageRef("urls", ("https://x.example/2.jpg",))),
        ("a b", 2, 0, ImageRef("file", ("3.jpg",))),
        ("2", 3, 0, ImageRef("urls", ("https://x.example/4.png",))),
    ]
    assert [linearize(i.context, "letters") for i in found] == [
        "A: see",
        "A: see",
        "A: see B: nice",
        "A: draw B: here",
    ]


IMAGE_PART = {"type": "image", "image": "1.jpg"}

MISSPELT = [
    ({"turns": [{"text": "a", "image": ["1.jpg"]}]}, "turn 0: got 'image', expected 'images'"),
    ({"turns": [{"text": "a", "Images": ["1.jpg"]}]}, "turn 0: got 'Images', expected 'images'"),
    (
        {"turns": [{"text": "a"}, {"txt": "b", "images": ["1"]}]},
        "turn 1: got 'txt', expected 'text'",
    ),
    ({"turns": [{"text": "a", "speaker_id": 1}]}, "turn 0: got 'speaker_id', expected 'speaker'"),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a", "imageurl": ""}]}
            ]
        },
        "turn 0 part: got 'imageurl', expected 'image_url'",
    ),
    (
        {"messages": [{"role": "user", "contents": "a"}]},
        "turn 0: got 'contents', expected 'content'",
    ),
]


@pytest.mark.parametrize(("fields", "detail"), MISSPELT)
def test_misspelt_jsonl_field_is_record_issue(
    tmp_path: Path, fields: dict[str, Any], detail: str
) -> None:
    write_lines(tmp_path / "train.jsonl", {"id": 1, **fields}, PLAIN)
    found, issues = instances("jsonl", tmp_path, "train")
    assert {"a b"} <= {instance.dialog_id for instance in found}
    assert [(issue.reason, issue.detail) for issue in issues] == [("unknown_field", detail)]


EXTRA = [
    {"n_turns": 2},
    {"num_messages": 2},
    {"message": "a"},
    {"turn": 1},
    {"n_images": 1},
    {"image_ids": [1]},
    {"speaker_id": 1},
    {"image": None},
]


@pytest.mark.parametrize("extra", EXTRA, ids=lambda extra: next(iter(extra)))
def test_extra_field_with_similar_name_keeps_record(tmp_path: Path, extra: dict[str, Any]) -> None:
    made = [CHAT | {"id": n} | extra for n in range(150)]
    turns = [{"text": "a"} | extra, {"text": "b", "images": ["1.jpg"]}]
    made += [{"id": n, "turns": turns} for n in range(150, 300)]
    write_lines(tmp_path / "train.jsonl", *made)
    issues: list[RecordIssue] = []
    found = list(read_instances("jsonl", tmp_path, "train", on_problem=issues.append))
    assert len(found) == 300
    assert set(reasons(issues)) <= {"unknown_field"}
    # No issue for a name of the record itself, nor for a field without a value.
    assert all("turn 0: " in issue.detail for issue in issues)
    assert issues or not {"n_images", "image_ids", "speaker_id"} & set(extra)


def test_record_without_turns_or_messages_hints_nearest_field(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", {"id": 1, "message": CHAT["messages"]}, PLAIN)
    _, issues = instances("jsonl", tmp_path, "train")
    (issue,) = issues
    assert issue.reason == "missing_field"
    assert issue.detail.endswith("got 'message', expected 'messages'")


ROLES = {"Assistant": 1, "USER": 0, "bot": 1, "model": 1, "human": 0, "gpt": 1}


@pytest.mark.parametrize("role", sorted(ROLES))
def test_role_aliases_map_to_speakers(tmp_path: Path, role: str) -> None:
    messages = [{"role": role, "content": "a"}, {"role": "user", "content": [IMAGE_PART]}]
    write_lines(tmp_path / "train.jsonl", {"id": 1, "messages": messages})
    (found,), issues = instances("jsonl", tmp_path, "train")
    assert found.context[0] == Turn(ROLES[role], "a")
    assert issues == []


def test_unknown_role_text_is_dropped_with_issue(tmp_path: Path) -> None:
    other = [{"role": "critic", "content": "a"}, {"role": "critic", "content": ""}]
    messages = [*other, {"role": "user", "content": [{"type": "text", "text": "b"}, IMAGE_PART]}]
    write_lines(tmp_path / "train.jsonl", {"id": 1, "messages": messages})
    (found,), issues = instances("jsonl", tmp_path, "train")
    assert linearize(found.context) == "# b"
    assert [(p.reason, p.detail.partition(",")[0]) for p in issues] == [
        ("wrong_type", "turn 0: got role 'critic'")
    ]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_audio", "input_audio": {"data": "AA"}},
        {"type": "refusal", "refusal": "no"},
        {"type": "thing", "text": {"x": 1}},
        {"type": "image"},
        {"text": "no type"},
    ],
)
def test_unknown_content_part_is_skipped_with_issue(tmp_path: Path, part: dict[str, Any]) -> None:
    parts = [{"type": "text", "text": "a"}, part, IMAGE_PART]
    write_lines(
        tmp_path / "train.jsonl", {"id": 1, "messages": [{"role": "user", "content": parts}]}
    )
    (found,), issues = instances("jsonl", tmp_path, "train")
    assert (linearize(found.context), found.image_ref.value) == ("# a", ("1.jpg",))
    assert len(issues) == 1


@pytest.mark.parametrize("content", [{"ok": True}, "x" * 100_000, [1, {"text": {}}]])
def test_tool_message_content_is_not_parsed(tmp_path: Path, content: Any) -> None:
    messages = [{"role": "tool", "content": content}, *CHAT["messages"][1:]]
    write_lines(tmp_path / "train.jsonl", CHAT | {"messages": messages})
    found, issues = instances("jsonl", tmp_path, "train")
    assert (len(found), issues) == (1, [])


def test_missing_dialog_id_is_derived_from_content(tmp_path: Path) -> None:
    pairs = [
        [{"role": "user", "content": f"draw {n}"}, {"role": "assistant", "content": [IMAGE_PART]}]
        for n in (1, 2, 1)
    ]
    records = [{"messages": messages} for messages in pairs]
    write_lines(tmp_path / "a/train.jsonl", *records)
    write_lines(tmp_path / "b/train.jsonl", *(dict(r, meta=1) for r in reversed(records)))
    one, issues = instances("jsonl", tmp_path / "a", "train")
    other, _ = instances("jsonl", tmp_path / "b", "train")
    assert len(one) == 2
    assert set(one) == set(other)
    assert reasons(issues) == Counter({"duplicate_dialog_id": 1})


def test_jsonl_speakers_may_be_names(tmp_path: Path) -> None:
    turns = [{"speaker": name, "text": name} for name in ("Al", "Bo", "Al", "Cy")]
    last = {"speaker": "Bo", "images": ["1.jpg"]}
    write_lines(
        tmp_path / "train.jsonl",
        {"id": 1, "turns": [*turns, last]},
        {"id": 2, "turns": [turns[0], last | {"speaker": 1}]},
        {"id": 3, "turns": [{"speaker": str(n), "text": "a"} for n in range(129)]},
    )
    (found,), issues = instances("jsonl", tmp_path, "train")
    assert [turn.speaker for turn in found.context] == [0, 1, 0, 2, 1]
    assert [issue.reason for issue in issues] == ["wrong_type", "too_large"]


def test_jsonl_ignores_other_fields(tmp_path: Path) -> None:
    extra = {"uid": 7, "source": "app", "picture": "x", "turn": 3, "images_seen": []}
    turn = {
        "text": "a",
        "images": ["1.jpg"],
        "image": "1.jpg",
        "time": 5,
        "name": "Al",
        "role": "x",
    }
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "contents": {}}]}
    part = {"type": "image_url", "image_url": {"url": "2.jpg", "detail": "low"}, "cache": {}}
    write_lines(
        tmp_path / "train.jsonl",
        {"id": 1, "turns": [turn], **extra},
        {"id": 2, "messages": [call, {"role": "user", "content": [part], "refusal": None}]}
        | {"model": "m", "tools": []},
    )
    found, issues = instances("jsonl", tmp_path, "train")
    assert [instance.dialog_id for instance in found] == ["1"]
    assert [issue.reason for issue in issues] == ["empty_context"]


def test_jsonl_record_with_turns_and_messages_is_issue(tmp_path: Path) -> None:
    both = {"turns": PLAIN["turns"], "messages": CHAT["messages"]}
    write_lines(
        tmp_path / "train.jsonl",
        {"id": 1, "turns": [], "messages": CHAT["messages"]},
        {"id": 2, "turns": PLAIN["turns"], "messages": []},
        {"id": 3} | both,
    )
    found, issues = instances("jsonl", tmp_path, "train")
    assert [instance.dialog_id for instance in found] == ["1", "2", "2", "2"]
    assert [(p.reason, p.where) for p in issues] == [("wrong_type", "train.jsonl line 3")]


def test_image_url_may_be_plain_string(tmp_path: Path) -> None:
    parts = [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": "https://x.example/1.jpg"},
        {"type": "image_url", "image_url": "data:image/png;base64,AA"},
    ]
    write_lines(
        tmp_path / "train.jsonl", {"id": 1, "messages": [{"role": "user", "content": parts}]}
    )
    (found,), issues = instances("jsonl", tmp_path, "train")
    assert found.image_ref == ImageRef("urls", ("https://x.example/1.jpg",))
    assert reasons(issues) == Counter({"bad_image_ref": 1})


def test_images_in_turn_first_takes_first_usable_image(tmp_path: Path) -> None:
    turn = [text("a"), media("../1"), media("2"), media("3")]
    write_lines(tmp_path / "train/conversations.json", mmdialog(turn, [media("4"), media("5")]))
    first, issues = instances("mmdialog", tmp_path, "train", images_in_turn="first")
    assert [(i.turn, i.image, i.image_ref.value[0]) for i in first] == [
        (0, 1, "train/2.jpg"),
        (1, 0, "train/4.jpg"),
    ]
    assert reasons(issues) == Counter({"bad_image_ref": 1})


@pytest.mark.parametrize("role", ["system", "developer", "tool"])
def test_system_and_tool_messages_get_no_speaker_mark(tmp_path: Path, role: str) -> None:
    messages = [{"role": role, "content": "be kind"}, *CHAT["messages"][1:]]
    write_lines(tmp_path / "train.jsonl", CHAT | {"messages": messages})
    (found,), _ = instances("jsonl", tmp_path, "train")
    assert found.turn == 3
    assert linearize(found.context, "letters", empty_turns="keep") == "A: draw B: B: here"
    config = TextConfig(empty_turns="keep", max_turns=9, keep="start")
    assert context_text(found.context, config) == "# draw # # here"


def test_jsonl_direction_first(tmp_path: Path) -> None:
    write_lines(tmp_path / "val.jsonl", PLAIN, CHAT)
    found, issues = instances("jsonl", tmp_path, "valid", direction="first")
    assert {instance.direction for instance in found} == {"first"}
    assert [linearize(i.context) for i in found] == ["# nice", "# nice", "# thanks"]
    assert reasons(issues) == Counter({"empty_context": 1})


def test_direction_first_works_for_every_corpus(tmp_path: Path) -> None:
    lines = [mmdialog([text("a"), media("1")], [text("b")], [text("c"), media("2")])]
    write_lines(tmp_path / "train/conversations.json", *lines)
    after, _ = instances("mmdialog", tmp_path, "train", direction="first")
    assert [linearize(i.context) for i in after] == ["# b # c"]
    own, _ = instances("mmdialog", tmp_path, "train", direction="first", own_turn="include")
    assert [linearize(i.context) for i in own] == ["# a # b # c", "# c"]
    record = photochat()
    record["dialogue"].append({"message": "nice", "share_photo": False, "user_id": 1})
    write_lines(tmp_path / "chat/train/train_00.json", [record])
    (found,), _ = instances("photochat", tmp_path / "chat", "train", direction="first")
    assert (found.direction, linearize(found.context)) == ("first", "# nice")


def test_earlier_images_option_leaves_mark(tmp_path: Path) -> None:
    turns = [[text("a"), media("1"), media("2")], [media("3")], [text("b"), media("4")]]
    write_lines(tmp_path / "train/conversations.json", mmdialog(*turns))
    marked, _ = instances("mmdialog", tmp_path, "train", earlier_images="[photo]")
    assert [linearize(i.context) for i in marked] == [
        "# a",
        "# a [photo]",
        "# a [photo] [photo]",
        "# a [photo] [photo] # [photo] # b",
    ]
    bare, _ = instances("mmdialog", tmp_path, "train")
    assert [i.key for i in marked] == [i.key for i in bare]


def test_emoji_unicode_converts_shortcodes(tmp_path: Path) -> None:
    line = "nice :raising_hands: :no_such_name: at 10:30"
    write_lines(tmp_path / "train/conversations.json", mmdialog([text(line), media("1")]))
    (found,), _ = instances("mmdialog", tmp_path, "train", emoji="unicode")
    assert linearize(found.context, "space") == "nice \U0001f64c :no_such_name: at 10:30"


def test_mmdialog_part_may_hold_text_and_image(tmp_path: Path) -> None:
    write_lines(tmp_path / "train/conversations.json", mmdialog([text("a") | media("1")]))
    (found,), issues = instances("mmdialog", tmp_path, "train")
    assert (linearize(found.context), issues) == ("# a", [])


@pytest.mark.parametrize("key", ["--help", "-rf", "-", "-1x"])
def test_media_key_like_cli_option_is_record_issue(tmp_path: Path, key: str) -> None:
    write_lines(tmp_path / "train/conversations.json", mmdialog([text("a"), media(key)]))
    found, issues = instances("mmdialog", tmp_path, "train")
    assert (found, reasons(issues)) == ([], Counter({"bad_image_ref": 1}))


def test_max_broken_exceeded_raises_after_last_record(tmp_path: Path) -> None:
    lines = [json.dumps(PLAIN | {"id": n}) if n % 4 else "{}" for n in range(1000)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    found = []
    with pytest.raises(DataError, match=r"250 broken of 1000 records: .*train.jsonl line 1: "):
        found.extend(read_instances("jsonl", tmp_path, "train", on_problem=ignore))
    assert len(found) == 750 * 3
    assert len(instances("jsonl", tmp_path, "train", max_broken=0.25)[0]) == 750 * 3
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:100]))
    assert len(list(read_instances("jsonl", tmp_path, "train", on_problem=ignore))) == 75 * 3
    with pytest.raises(DataError, match="at most 0;"):
        list(read_instances("jsonl", tmp_path, "train", on_problem=ignore, max_broken=0))


@pytest.mark.parametrize(("num_broken", "num_sound"), [(1, 0), (2, 1), (100, 99)])
def test_file_with_mostly_broken_records_is_error(
    tmp_path: Path, num_broken: int, num_sound: int
) -> None:
    broken = [{"id": n} for n in range(num_broken)]
    sound = [PLAIN | {"id": n} for n in range(num_sound)]
    write_lines(tmp_path / "train.jsonl", *broken, *sound)
    expected = (
        f"got {num_broken} broken of .* of train.jsonl" if num_sound else "no record could be read"
    )
    with pytest.raises(DataError, match=expected):
        list(read_instances("jsonl", tmp_path, "train", on_problem=ignore))
    write_lines(tmp_path / "train.jsonl", *broken, *sound, *(PLAIN | {"id": n} for n in "ab"))
    if num_sound:
        list(read_instances("jsonl", tmp_path, "train", on_problem=ignore))
    assert len(instances("jsonl", tmp_path, "train")[0]) == (num_sound + 2) * 3


def test_record_with_several_issues_counts_as_broken_once(tmp_path: Path) -> None:
    critics = [{"role": "critic", "content": "a"}] * 3
    with_issues = [{"id": n, "messages": critics} for n in range(50)]
    write_lines(
        tmp_path / "train.jsonl", *with_issues, *(PLAIN | {"id": n} for n in range(50, 100))
    )
    _, issues = instances("jsonl", tmp_path, "train")
    assert len(issues) == 150
    instances("jsonl", tmp_path, "train", max_broken=0.5)
    with pytest.raises(DataError, match="50 broken of 100 records"):
        instances("jsonl", tmp_path, "train", max_broken=0.49)


@pytest.mark.parametrize(
    "image",
    [
        "../x.jpg",
        "./../x.jpg",
        "/etc/passwd",
        ".//etc/passwd",
        "a/../../b",
        "a/./../b",
        ".",
        "./",
        "~/x",
        "file:///x",
        "data:image/png;base64,AA",
        "./data:image/png;base64,AA",
        "file:/etc/passwd",
        "C:/x",
        "12::00.jpg",
        "photo?.jpg",
        "s3://b/k",
        "C:\\x",
        "a\\b",
        "zip://x::y",
        "",
        "a//b",
        "a\nb",
        "*.jpg",
        "http://",
        "https:// x",
    ],
)
def test_jsonl_image_must_be_relative_path_or_http_url(tmp_path: Path, image: str) -> None:
    record = {"id": 1, "turns": [{"text": "a", "images": [image, "ok.jpg"]}]}
    write_lines(tmp_path / "test.jsonl", record)
    (found,), issues = instances("jsonl", tmp_path, "test")
    assert (found.image, found.image_ref.value) == (1, ("ok.jpg",))
    assert reasons(issues) == Counter({"bad_image_ref": 1})


def test_jsonl_image_path_accepts_dot_and_special_characters(
    tmp_path: Path,
) -> None:
    images = ["./p/1.jpg", "p/./2.jpg", "photo[1].jpg", "12:00:00.png", "p/a:b.jpg", "\u00fc.jpg"]
    write_lines(tmp_path / "test.jsonl", {"id": 1, "turns": [{"text": "a", "images": images}]})
    found, issues = instances("jsonl", tmp_path, "test")
    assert [i.image_ref.value[0] for i in found] == ["p/1.jpg", "p/2.jpg", *images[2:]]
    assert issues == []


def test_macos_companion_files_are_ignored(tmp_path: Path) -> None:
    """AppleDouble files of extended attributes, as on network drives and in zip files."""
    companion = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(220)
    dialogue = [
        {"message": "hi", "share_photo": False, "user_id": 0},
        {"message": "", "share_photo": True, "user_id": 1},
    ]
    photo = {"dialogue_id": 1, "dialogue": dialogue, "photo_url": "https://x.example/1.jpg"}
    for corpus, name, records in (
        ("photochat", "test_00.json", [[photo]]),
        ("mmdialog", "conversations.json", [mmdialog([text("a"), media("1")])]),
    ):
        write_lines(tmp_path / corpus / "test" / name, *records)
        for other in (f"._{name}", f".{name}", ".DS_Store"):
            (tmp_path / corpus / "test" / other).write_bytes(companion)
        found, issues = instances(corpus, tmp_path / corpus, "test")
        assert (len(found), issues) == (1, [])


@given(JSON, st.sampled_from(["mmdialog", "photochat", "jsonl"]))
def test_parser_raises_only_record_error(body: Any, corpus: str) -> None:
    reader = build_corpus(corpus, {})
    parse = reader.parser(str(SHARED), "train", InlineImages())
    for record in (
        {"id": 1, "turns": body},
        {"id": 1, "messages": [body]},
        {"id": 1, "turns": [body, {"images": body}]},
        {"id": 1, "conversations": [{"from": "gpt", "value": "<image>"}], "images": body},
        {"id": 1, "messages": [{"role": "user", "content": body, "images": body}]},
        {"dialogue_id": 1, "dialogue": body},
        {"conversation_id": 1, "conversation": [{"turn": [body]}]},
    ):
        stream = io.BytesIO(json.dumps(record).encode())
        ((_, decoded),) = read_objects(stream, "f", ignore, reader.record_type)
        try:
            parsed = decoded if isinstance(decoded, RecordError) else parse(decoded, ignore)
        except RecordError as error:
            parsed = error
        if isinstance(parsed, RecordError):
            assert parsed.reason in {
                "wrong_type",
                "missing_field",
                "mismatched_images",
                "no_image",
            }


def test_instance_keys_do_not_depend_on_record_order(tmp_path: Path) -> None:
    for name, records in [("a", [PLAIN, CHAT]), ("b", [CHAT, PLAIN])]:
        write_lines(tmp_path / name / "train.jsonl", *records)
    one, other = (instances("jsonl", tmp_path / name, "train")[0] for name in "ab")
    assert set(one) == set(other)


def test_corpus_source_may_be_url() -> None:
    import fsspec

    data = json.dumps(CHAT).encode()
    fsspec.filesystem("memory").pipe_file("/chats/train.jsonl", data)
    (found,) = read_instances("jsonl", "memory://chats", "train")
    assert found.key == "train-2-3-0"


@pytest.mark.parametrize(
    ("corpus", "split", "options", "message"),
    [
        ("mmdialogue", "train", {}, "did you mean 'mmdialog'"),
        ("mmdialog", "trian", {}, "did you mean 'train'"),
        ("mmdialog", "train", {"own_trun": "include"}, "did you mean 'own_turn'"),
        ("mmdialog", "train", {"repeated": "uniqe"}, "did you mean 'unique'"),
        ("mmdialog", "train", {"image_root": 5}, "got 5"),
        ("mmdialog", "train", {"limit": 0}, "no option 'limit'"),
        ("jsonl", "train", {"open_images_url": "x"}, "no option 'open_images_url'"),
    ],
)
def test_wrong_corpus_option_raises_at_once(
    tmp_path: Path, corpus: str, split: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_instances(corpus, tmp_path, split, **options)


def test_missing_split_raises_at_once(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", CHAT)
    with pytest.raises(DataError, match="found train"):
        read_instances("jsonl", tmp_path, "test")


def test_record_issues_are_logged_without_callback(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_lines(tmp_path / "train.jsonl", {"id": 1})
    with caplog.at_level(logging.WARNING):
        assert list(read_instances("jsonl", tmp_path, "train", max_broken=1.0)) == []
    assert "train.jsonl line 1: turns: missing, and so are messages" in caplog.text
