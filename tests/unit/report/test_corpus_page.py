"""The corpus report shows the figures of the survey and no data of the corpus."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from d2i.report import write_corpus_report

HOSTILE = "<script>alert('hi')</script> & \"more\""
SPLITS = ("train", "valid", "test")
COUNTS = [10, 50, 300, 401, 207, 93, 0, 47]
OPTIONS = (("own_turn", "exclude"), ("text.strategy", "letters"), ("text.num_windows", 2))


def make_survey(*splits: str) -> dict[str, Any]:
    """Make a survey in which all figures differ, so that none is mistaken for another."""
    numbers = count(1_000_003, 7919)
    return {
        "corpus": "mmdialog",
        "licence": "Ask <the authors>.",
        "source": "data/MMDialog",
        "options": {"own_turn": "include", "max_broken": 0.125},
        "text": {"strategy": "hash", "keep": "end", "max_turns": None, "num_windows": 1},
        "splits": {split: make_split(numbers) for split in splits},
        "leaks": {
            "near": True,
            "counts": [
                make_leak(numbers, "train", "test", "near_duplicate"),
                make_leak(numbers, "train", "test", "shared_image"),
            ],
        },
    }


def make_split(numbers: Iterator[int]) -> dict[str, Any]:
    fields = ("dialogs", "dialogs_with_images", "turns", "occurrences", "images", "instances")
    return {
        **{f"num_{field}": next(numbers) for field in fields},
        "problems": {"empty_context": next(numbers), "invalid_json": next(numbers)},
        "first_problems": {
            "invalid_json": {"where": "train.jsonl line 7", "detail": "cannot be read"}
        },
        "lengths": {
            "num_sampled": next(numbers),
            "room": 75,
            "bin_width": 15,
            "counts": [number and number + next(numbers) for number in COUNTS],
            "mean": 1 / next(numbers),
            "longest": next(numbers),
            "share_over": 1 / next(numbers),
        },
        "variants": [make_variant(numbers, option, value) for option, value in OPTIONS],
        "pictures": {
            "num_read": next(numbers),
            "failures": {"missing_file": next(numbers), "decode_error": next(numbers)},
        },
    }


def make_variant(numbers: Iterator[int], option: str, value: str | int) -> dict[str, Any]:
    return {
        "option": option,
        "value": value,
        "num_instances": next(numbers),
        "num_empty": next(numbers),
        "mean_tokens": 1 / next(numbers),
        "share_over": 1 / next(numbers),
    }


def make_leak(numbers: Iterator[int], split: str, other: str, reason: str) -> dict[str, Any]:
    return {
        "split": split,
        "other_split": other,
        "reason": reason,
        "num_instances": next(numbers),
        "num_images": next(numbers),
    }


def unmeasured() -> dict[str, Any]:
    return {
        "num_sampled": 0,
        "room": 75,
        "bin_width": 15,
        "counts": [0] * 8,
        "mean": None,
        "longest": 0,
        "share_over": None,
    }


def numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from numbers_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from numbers_in(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


class Page(HTMLParser):
    """Elements, URLs, exact values and bars of a page; checks that it is well formed."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.urls: list[str] = []
        self.values: list[str] = []
        self.bars: list[dict[str, str]] = []
        self.open: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.urls += [v for n, v in named.items() if n in ("src", "href", "xlink:href")]
        if tag == "data":
            self.values.append(named["value"])
        if tag == "rect":
            self.bars.append(named)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "corpus.html"


def render(survey: dict[str, Any], out: Path) -> str:
    write_corpus_report(survey, out)
    source = out.read_text(encoding="utf-8")
    assert Page(source).open == []
    return source


def rows_of(source: str, anchor: str) -> dict[str, list[str]]:
    """Return the exact figures of a section's table by row name."""
    section = re.search(rf'<section id="{anchor}">(.*?)</section>', source, re.DOTALL)
    assert section
    return {
        re.sub("<small>.*|<[^>]+>", "", name): re.findall(r'<data value="([^"]+)"', cells)
        for name, cells in re.findall(
            r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', section[1], re.DOTALL
        )
    }


def left_out(source: str) -> dict[str, str]:
    """Return the titles of the sections that are left out, with the reasons."""
    lines = re.findall(r'<p class="left-out">Left out:(.*)</p>', source)
    return dict(re.findall(r"<strong>([^<]+)</strong> \(([^<]+)\)[;.]", "".join(lines)))


def percentage(value: str) -> float:
    assert value.endswith("%")
    return float(value[:-1])


def test_page_shows_every_figure_of_survey(out: Path) -> None:
    survey = make_survey(*SPLITS)
    page = Page(render(survey, out))
    # The bin width shows in the names of the bins, an option's value beside its name.
    expected = {
        repr(number)
        for part in (survey["splits"], survey["leaks"])
        for number in numbers_in(part)
        if number not in (15, 2)
    }
    assert expected - set(page.values) == set()


def test_header_shows_totals_and_key_figures_of_each_split(out: Path) -> None:
    survey = make_survey(*SPLITS)
    source = render(survey, out)
    header = source[source.index("<header") : source.index("</header>")]
    splits = survey["splits"].values()
    totals = [
        sum(found[name] for found in splits)
        for name in ("num_dialogs", "num_occurrences", "num_instances")
    ]
    instances = [found["num_instances"] for found in splits]
    too_long = [found["lengths"]["share_over"] for found in splits]
    leaking = sum(leak["num_instances"] for leak in survey["leaks"]["counts"])
    figures = [*totals, *instances, *too_long, 75, leaking]
    assert Page(header).values == [repr(number) for number in figures]
    assert ">mmdialog corpus: data/MMDialog</p>" in header


def test_counts_table_has_split_columns_and_sums(out: Path) -> None:
    survey = make_survey(*SPLITS)
    rows = rows_of(render(survey, out), "counts")
    splits = survey["splits"].values()
    for name, field in (("Dialogs", "num_dialogs"), ("Instances", "num_instances")):
        counts = [found[field] for found in splits]
        assert rows[name] == [str(number) for number in [*counts, sum(counts)]]
    # Two splits may share an image, so there is no sum.
    assert rows["Distinct images"] == [str(found["num_images"]) for found in splits]


def test_record_issues_and_images_are_listed_by_reason(out: Path) -> None:
    survey = make_survey("train", "test")
    del survey["splits"]["test"]["problems"]["invalid_json"]
    broken = survey["splits"]["train"]["problems"]["invalid_json"]
    source = render(survey, out)
    assert rows_of(source, "problems")["Invalid json"] == [str(broken), "0", str(broken)]
    assert "first: train.jsonl line 7: cannot be read" in source
    missing = [found["pictures"]["failures"]["missing_file"] for found in survey["splits"].values()]
    expected = [str(number) for number in [*missing, sum(missing)]]
    assert rows_of(source, "images")["Missing file"] == expected


def test_options_table_compares_with_current_settings(out: Path) -> None:
    survey = make_survey("train")
    found = survey["splits"]["train"]
    found["variants"][0]["num_instances"] = found["num_instances"] - 640_000
    found["variants"][1]["num_instances"] = found["num_instances"]
    source = render(survey, out)
    rows = rows_of(source, "options")
    assert rows["as set"][:2] == [
        str(found["num_instances"]),
        str(found["problems"]["empty_context"]),
    ]
    assert rows["corpus.own_turn=exclude"][:2] == [str(found["num_instances"] - 640_000), "-640000"]
    assert "\N{MINUS SIGN}640,000</data>" in source
    assert len(rows["text.strategy=letters"]) == 4
    assert '<th scope="row"><code>text.num_windows=2</code>' in source


def test_current_options_are_listed(out: Path) -> None:
    source = render(make_survey("train"), out)
    for name, value in (
        ("corpus.own_turn", "<code>include</code>"),
        ("corpus.max_broken", "<code>0.125</code>"),
        ("text.num_windows", "<code>1</code>"),
        ("text.max_turns", '<span class="absent">not set</span>'),
    ):
        assert f'<th scope="row"><code>{name}</code></th><td>{value}</td>' in source


@pytest.mark.parametrize("counts", [COUNTS, [1] * 20, [0, 0, 0, 0, 0, 3]])
def test_bar_heights_match_counts(counts: list[int], out: Path) -> None:
    survey = make_survey("train")
    survey["splits"]["train"]["lengths"]["counts"] = counts
    bars = Page(render(survey, out)).bars
    heights = [percentage(bar["height"]) for bar in bars]
    highest = max(heights)
    assert 90 < highest <= 100
    assert [height / highest for height in heights] == pytest.approx(
        [number / max(counts) for number in counts], abs=1e-4
    )
    # Every bar stands on the axis, in the order of its bin, inside the plot.
    assert [percentage(b["y"]) + percentage(b["height"]) for b in bars] == pytest.approx(
        [100.0] * len(counts), abs=0.002
    )
    starts = [percentage(bar["x"]) for bar in bars]
    assert starts == sorted(starts)
    assert starts[0] > 0
    assert starts[-1] + percentage(bars[-1]["width"]) < 100


def test_bars_over_token_limit_are_marked_and_separated(out: Path) -> None:
    source = render(make_survey("train"), out)
    bars = Page(source).bars
    assert [bar["class"] for bar in bars] == ["within"] * 5 + ["beyond"] * 3
    edge = re.search(r'<line class="edge" x1="([\d.]+)%"', source)
    assert edge
    at = float(edge[1])
    assert percentage(bars[4]["x"]) + percentage(bars[4]["width"]) < at < percentage(bars[5]["x"])
    assert at == pytest.approx(100 * 75 / 120, abs=0.001)


def test_plot_has_accessible_titles(out: Path) -> None:
    survey = make_survey(*SPLITS)
    survey["splits"]["valid"]["lengths"].update(counts=COUNTS, share_over=0.41)
    source = render(survey, out)
    titles = re.findall(r'<svg role="img"[^>]*><title>([^<]+)</title>', source)
    assert [title.partition(":")[0] for title in titles] == list(SPLITS)
    assert "41.0 % exceed the limit of 75" in titles[1]
    assert "<title>46 to 60 tokens: 401</title>" in source
    assert "<title>106 tokens or more: 47</title>" in source
    assert '<th scope="row">106 tokens or more</th>' in source


@pytest.mark.parametrize("num_bins", [6, 8, 20])
def test_plot_labels_share_of_too_long_contexts(num_bins: int, out: Path) -> None:
    survey = make_survey("train")
    survey["splits"]["train"]["lengths"].update(counts=[3] * num_bins, share_over=0.41)
    labels = re.findall(r'<text class="side"[^>]*>([^<]+)</text>', render(survey, out))
    assert "41.0\N{NARROW NO-BREAK SPACE}% too long" in labels[-1]
    # On the right if there is room, else it points to the right.
    assert ("fits" in labels) == (num_bins == 20)


def test_sampled_lengths_are_labelled_as_sample(out: Path) -> None:
    survey = make_survey("train")
    survey["splits"]["train"]["lengths"]["num_sampled"] = 2000
    source = re.sub("<[^>]+>", "", render(survey, out))
    assert f"on a sample of 2,000 of {survey['splits']['train']['num_instances']:,}" in source
    assert "tokens on a sample of 2,000 instances" in source


def test_leaks_are_explained_with_exclude_commands(out: Path) -> None:
    survey = make_survey(*SPLITS)
    near, shared = survey["leaks"]["counts"]
    near["num_instances"], shared["num_instances"] = 1, 20_110
    source = render(survey, out)
    page_text = re.sub("<[^>]+>", "", source)
    assert "20,110 training instances have an image that is also in test" in page_text
    assert "1 training instance has a near-duplicate of an image in test" in page_text
    assert "train \N{RIGHTWARDS ARROW} test20,111" in page_text
    corpus = "--corpus mmdialog --source data/MMDialog"
    assert f"d2i corpus {corpus} --leaks leaks.jsonl\n" in page_text
    assert f"d2i preprocess {corpus} --exclude leaks.jsonl" in page_text


@pytest.mark.parametrize("near", [True, False])
@pytest.mark.parametrize("leaks", [True, False])
def test_page_states_if_near_duplicates_were_searched(near: bool, leaks: bool, out: Path) -> None:
    survey = make_survey(*SPLITS)
    survey["leaks"]["near"] = near
    if not leaks:
        survey["leaks"]["counts"] = []
    source = render(survey, out)
    assert ("Near-duplicates were not searched for" in source) == (not near)
    assert ("near-duplicates were not searched for" in source) == (not near)
    assert ("were searched for" in source) == near
    assert ("--exclude leaks.jsonl" in source) == leaks
    assert ("No split has an image of another split" in source) == (not leaks)


def test_survey_strings_are_html_escaped(out: Path) -> None:
    survey = make_survey(*SPLITS)
    found = survey["splits"]["train"]
    survey["corpus"] = survey["source"] = HOSTILE
    survey["options"] = {HOSTILE: HOSTILE}
    survey["text"][HOSTILE] = [HOSTILE]
    found["problems"] = {HOSTILE: 1}
    found["first_problems"] = {HOSTILE: {"where": HOSTILE, "detail": HOSTILE}}
    found["pictures"]["failures"] = {HOSTILE: 2}
    found["variants"][0].update(option=HOSTILE, value=HOSTILE)
    for field in ("split", "other_split", "reason"):
        survey["leaks"]["counts"][0][field] = HOSTILE
    survey["splits"] = {
        HOSTILE if split == "train" else split: survey["splits"][split] for split in SPLITS
    }
    source = render(survey, out)
    plain = render(make_survey(*SPLITS), out)
    assert "<script" not in source
    # An unescaped quote or tag would give other elements than a plain survey.
    assert set(Page(source).tags) == set(Page(plain).tags)
    assert source.count("&lt;script&gt;") > 10
    assert not re.search(r"alert\('hi'\)|\"more\"", source)


def test_page_loads_no_external_resource(out: Path) -> None:
    source = render(make_survey(*SPLITS), out)
    page = Page(source)
    assert not {"script", "link", "iframe", "object", "embed", "base", "img"} & set(page.tags)
    assert "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\"" in source
    assert not re.search(r"https?://|@import|url\(|@font-face", source)
    assert len(page.urls) == 6
    assert all(f'<section id="{url[1:]}">' in source for url in page.urls)


def test_page_states_it_contains_no_corpus_data(out: Path) -> None:
    assert "no text and no image of the corpus" in render(make_survey("train"), out)


def test_report_is_deterministic_and_keeps_survey_unchanged(out: Path) -> None:
    survey = make_survey(*SPLITS)
    before = copy.deepcopy(survey)
    assert render(survey, out) == render(copy.deepcopy(survey), out)
    assert survey == before


@pytest.mark.parametrize("splits", [(), ("test",), ("train", "test")])
def test_report_of_any_splits(splits: tuple[str, ...], out: Path) -> None:
    survey = make_survey(*splits)
    survey["leaks"]["counts"] = []
    source = render(survey, out)
    assert source.count("<svg ") == len(splits)
    omitted = left_out(source)
    assert ("Leaks between splits" in omitted) == (len(splits) < 2)
    assert ("Leaked instances" in source) == (len(splits) == 2)


def test_report_of_splits_without_instances(out: Path) -> None:
    survey = make_survey(*SPLITS)
    survey["leaks"]["counts"] = []
    for found in survey["splits"].values():
        found.update({name: 0 for name in found if name.startswith("num_")})
        found.update(problems={}, lengths=unmeasured())
        found["pictures"] = None
        for variant in found["variants"]:
            variant.update(num_instances=0, num_empty=0, mean_tokens=None, share_over=None)
    source = render(survey, out)
    assert "<svg" not in source
    assert "Contexts over the limit" not in source
    assert left_out(source) == {
        "Context lengths": "no context was measured",
        "Record issues": "no record has an issue",
        "Image files": "the image files were not opened",
    }
    # A column without a number is left out.
    assert "Too long</th>" not in source
    assert source.count(">Empty contexts</th>") == 3


def test_unread_split_has_no_column(out: Path) -> None:
    survey = make_survey(*SPLITS)
    survey["splits"]["valid"]["pictures"] = None
    survey["splits"]["valid"]["lengths"] = unmeasured()
    source = render(survey, out)
    assert "Those of valid were not opened" in source
    assert len(rows_of(source, "images")["Missing file"]) == 3
    assert source.count("<svg ") == 2
    assert source.count("No context was measured") == 1
