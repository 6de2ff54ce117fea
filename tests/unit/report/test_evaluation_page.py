"""The report is one self-contained HTML file, and its numbers are those of the result files."""

from __future__ import annotations

import html
import io
import json
import re
import tarfile
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jinja2 import UndefinedError
from PIL import Image

from d2i.cli.report import report
from d2i.dialog import NO_SPEAKER, key_order_hash
from d2i.errors import ConfigError, DataError
from d2i.io import storage
from d2i.report import ShownSample, document, read_evaluation, write_report, write_samples_page
from d2i.report.conversations import is_correction
from d2i.report.data_split import speaking_turns
from d2i.report.svg import ticks
from d2i.report.training import read_run, smooth
from d2i.shards import Sample, json_bytes, npy_bytes, write_manifest, write_shard
from tests.processes import run_process

HOSTILE = "<script>alert('hi')</script> & \"more\" :sun:"
ATTRIBUTES = {"shape": ("ball", "box"), "colour": ("red", "blue")}
NUM_TEST = 15
SCORES = (
    {"fid": 31.234567, "kid": 0.0412345, "kid_std": 0.0011, "is": 2.5, "is_std": 0.25},
    {"fid": 17.654321, "kid": 0.0212345, "kid_std": 0.0012, "is": None, "is_std": None},
)
CLIP_I = (61.73211, 84.91357)
SHARES = (0.3141592, 0.7182818)
TIMES = {
    "stages": [
        {
            "name": "preprocess",
            "command": "d2i preprocess --out <data>",
            "seconds": 41.25,
            "detail": "2,512 pictures, 61/s",
        },
        {"name": "train", "command": "d2i train", "seconds": 123.5, "detail": "800 steps"},
    ],
    "machine": "2 cores & no GPU",
}
CARD = {
    "expected": NUM_TEST + 2,
    "found": NUM_TEST,
    "sampler": "dpm_solver",
    "num_steps": 25,
    "guidance_scale": 2.0,
    "seed": 0,
    "compute_batch_size": 50,
    "extractor": "clip_image 0123abcd, 5 classes",
    "weights": {"backbone": "ab" * 32},
    "versions": {"torch": "2.14.1"},
    "device": "cpu",
    "backbone": "uvit-s",
    "initial_weights": {"file": "published.pth", "sha256": "ef" * 32},
}


@dataclass(frozen=True)
class ReportInputs:
    """Generated inputs of a report: a data set, a run, and two evaluations of it."""

    root: Path
    keys: list[str]

    @property
    def eval_dirs(self) -> list[Path]:
        return [self.root / "eval" / name for name in ("before", "after")]

    def render(self, **options: Any) -> str:
        out = self.root / "report.html"
        write_report(self.eval_dirs, out, **options)
        return out.read_text(encoding="utf-8")


def png(number: int) -> bytes:
    colour = (40 * number % 256, 90, 255 - 30 * number % 256)
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(buffer, "PNG")
    return buffer.getvalue()


def make_split(directory: Path, split: str, count: int, failures: dict[str, int]) -> list[str]:
    context = [
        {"speaker": 0, "text": HOSTILE},
        {"speaker": 1, "text": ""},
        {"speaker": 1, "text": "a red ball?"},
        {"speaker": 0, "text": "no wait, the blue one"},
    ]
    moments = npy_bytes(np.zeros((8, 4, 4), np.float16))
    keys = [f"{split}-{number}-0-0" for number in range(count)]
    samples = [
        Sample(
            key,
            {
                "json": json_bytes({"key": key, "context": context}),
                "moments.npy": moments,
                "png": png(number),
            },
        )
        for number, key in enumerate(keys)
    ]
    write_shard(samples, str(directory), 0, failures=failures)
    write_manifest(str(directory), {})
    plan = {
        "num_instances": count + sum(failures.values()),
        "num_images": count,
        "num_excluded": 5 if split == "train" else 0,
        "problems": {"empty_context": 3} if split == "train" else {},
    }
    (directory / "plan").mkdir()
    (directory / "plan" / "plan.json").write_text(json.dumps(plan))
    return keys


def make_run(directory: Path) -> None:
    directory.mkdir()
    recipe = {"name": "tiny-recipe", "train": {"global_batch_size": 64}}
    (directory / "config.json").write_text(json.dumps({"recipe": recipe, "world_size": 2}))
    lines = [
        json.dumps(
            {
                "step": 10 * n,
                "loss": 1.0 / (1 + n),
                "lr": 1e-3,
                "num_images": 640 * n,
                "images_per_s": 123.456,
                "elapsed_s": 2.5 * n,
            }
        )
        for n in range(1, 41)
    ]
    (directory / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 410, "lo']))


def make_evaluation(directory: Path, number: int, keys: list[str], run: Path | None) -> None:
    (directory / "images").mkdir(parents=True)
    card = CARD | {
        "system": f"run:{run}" if run else "uvit-s",
        "label": "uvit-s, fine-tuned" if run else "uvit-s, not fine-tuned",
        "run": str(run) if run else None,
        "data": str(directory.parents[1] / "data" / "test"),
        "manifest_sha256": "cd" * 32,
    }
    scores = SCORES[number] | {"clip_i": CLIP_I[number], "kid_subset_size": 10}
    (directory / "scores.json").write_text(json.dumps({"scores": scores, "card": card}))
    with tarfile.open(directory / "images" / "000000.tar", "w") as tar:
        for index, key in enumerate(keys):
            member = tarfile.TarInfo(f"{key}.png")
            data = png(index + 100 * number)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    (directory / "judged.json").write_text(json.dumps(make_verdict(number, keys)))


def make_verdict(number: int, keys: list[str]) -> dict[str, Any]:
    share = {"generated": SHARES[number], "true": 0.9912345, "codec": None, "chance": 0.2954321}
    return {
        "judge": "Two attributes read by a rule.",
        "num_images": NUM_TEST,
        "accuracy": share,
        "by_attribute": dict.fromkeys(ATTRIBUTES, share),
        "examples": {
            key: {
                "wanted": {name: values[0] for name, values in ATTRIBUTES.items()},
                "read": {"shape": "ball", "colour": "blue" if number else None},
            }
            for key in keys
        },
    }


@pytest.fixture
def inputs(tmp_path: Path) -> ReportInputs:
    data = tmp_path / "data"
    make_split(data / "train", "train", 4, {"decode_error": 5, "not_an_image": 1})
    keys = make_split(data / "test", "test", NUM_TEST, {"too_small": 2})
    make_run(tmp_path / "run")
    inputs = ReportInputs(tmp_path, keys)
    # The second evaluation did not save the image of one dialog.
    make_evaluation(inputs.eval_dirs[0], 0, keys, None)
    make_evaluation(inputs.eval_dirs[1], 1, keys[:-1], tmp_path / "run")
    return inputs


class Page(HTMLParser):
    """The elements of a page, their URLs, exact values and alternative texts."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.resources: list[str] = []
        self.values: list[str] = []
        self.alts: list[str | None] = []
        self.open: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.append(tag)
        self.resources += [
            v or "" for n, v in attrs if n in ("src", "href", "xlink:href", "srcset")
        ]
        if tag == "data":
            self.values.append(named["value"] or "")
        if tag == "img":
            self.alts.append(named.get("alt"))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def rewrite(path: Path, change: dict[str, Any], part: str | None = None) -> None:
    document = json.loads(path.read_text())
    (document if part is None else document[part]).update(change)
    path.write_text(json.dumps(document))


def test_report_is_self_contained_html(inputs: ReportInputs) -> None:
    source = inputs.render(times=TIMES)
    page = Page(source)
    assert page.open == []
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert all(url.startswith(("data:image/", "#")) for url in page.resources)
    assert not re.search(r"https?://|@import|url\(", source)
    assert all(page.alts)
    anchors = [url[1:] for url in page.resources if url.startswith("#")]
    assert all(f'id="{anchor}"' in source for anchor in anchors)
    assert len(anchors) == 7


def test_report_is_deterministic(inputs: ReportInputs) -> None:
    assert inputs.render(times=TIMES) == inputs.render(times=TIMES)


def test_report_numbers_match_files(inputs: ReportInputs) -> None:
    page = Page(inputs.render(times=TIMES))
    files = [v for scores in SCORES for v in scores.values() if v is not None]
    files += [*CLIP_I, *SHARES, 0.9912345, 0.2954321, 41.25, 123.5, 41.25 + 123.5]
    files += [1.0 / 2, 1.0 / 41, 400, 64, 123.456, 100.0]
    assert {repr(value) for value in files} <= set(page.values)


def test_report_accounts_for_every_planned_instance(inputs: ReportInputs) -> None:
    source = inputs.render()
    rows = {
        re.sub("<[^>]+>", "", row[0]): re.findall(r'<data value="(\d+)"', row[1])
        for row in re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', source)
    }
    assert rows["Instances planned"] == ["10", "17", "27"]
    assert rows["Samples written"] == ["4", "15", "19"]
    assert rows["Dropped: decode error"] == ["5", "0", "5"]
    assert rows["Dropped: not an image"] == ["1", "0", "1"]
    assert rows["Dropped: too small"] == ["0", "2", "2"]
    assert rows["Record issues: empty context"] == ["3", "0", "3"]
    assert rows["Excluded by --exclude"] == ["5", "0", "5"]


def test_dialog_text_is_escaped(inputs: ReportInputs) -> None:
    source = inputs.render()
    assert "<script" not in source
    assert html.unescape(source).count(HOSTILE) == 12


def test_names_and_titles_are_escaped(inputs: ReportInputs) -> None:
    for directory in inputs.eval_dirs:
        rewrite(directory / "scores.json", {"label": '"><b id=x>', "extractor": "<i>"}, "card")
        rewrite(directory / "judged.json", {"judge": "<u>"})
    source = inputs.render(times=TIMES, title="</title><b>")
    assert not re.search(r"<b id=x>|<i>|<u>|</title><b>|<data>", source)


def test_shown_dialogs_are_first_by_hash_with_all_images(inputs: ReportInputs) -> None:
    source = inputs.render()
    shown = re.findall(r'<article class="conversation" aria-label="([^"]+)"', source)
    assert shown == sorted(inputs.keys[:-1], key=lambda key: key_order_hash(key, 0))[:12]
    assert len(Page(source).alts) == 12 * 3


def test_attributes_are_marked_right_or_wrong(inputs: ReportInputs) -> None:
    source = inputs.render()
    assert source.count('<li class="right"') == 12 * 2
    assert source.count('<li class="wrong"') == 12 * 2
    assert "shape right: </span> ball" in source
    assert "colour wrong: </span> no colour" in source
    assert "colour wrong: </span> blue" in source


@pytest.mark.parametrize(
    "change",
    [
        {"backbone": "uvit-s-deep"},
        {"initial_weights": {"file": "published.pth", "sha256": "0" * 64}},
        {"initial_weights": {"file": "published.pth"}},
        {"initial_weights": {"file": "scratch"}},
        {"run": None},
        {"context": "none"},
    ],
)
def test_before_and_after_columns_require_recorded_start(
    inputs: ReportInputs, change: dict[str, Any]
) -> None:
    assert '<th scope="col">Before</th><th scope="col">After</th>' in inputs.render()
    rewrite(inputs.eval_dirs[1] / "scores.json", change, "card")
    assert '<th scope="col">Before</th>' not in inputs.render()


def test_label_that_card_does_not_prove_is_marked(inputs: ReportInputs) -> None:
    """Neither a name of the paper nor `fine-tuned` is shown on the user's word alone."""
    before, after = (directory / "scores.json" for directory in inputs.eval_dirs)
    rewrite(before, {"label": "my model, fine-tuned"}, "card")
    rewrite(after, {"label": "U-ViT-Small + ours", "backbone": None}, "card")
    source = inputs.render()
    for name in ("my model, fine-tuned (by its label)", "U-ViT-Small + ours, not the paper's"):
        assert f"<strong>{name}</strong>" in html.unescape(source)
        assert f"<figcaption>{name}</figcaption>" in html.unescape(source)


def test_incomparable_scores_are_in_separate_tables(inputs: ReportInputs) -> None:
    rewrite(inputs.eval_dirs[1] / "scores.json", {"extractor": "inception"}, "card")
    source = inputs.render()
    assert "they differ in extractor" in source
    assert "<caption>FID on clip_image 0123abcd, 5 classes" in source
    assert "<caption>FID on inception" in source
    headline = source[: source.index("<nav")]
    assert "FID" not in headline


@pytest.mark.parametrize("count", [1, 3])
def test_report_accepts_any_number_of_evaluations(inputs: ReportInputs, count: int) -> None:
    directories = [*inputs.eval_dirs, inputs.eval_dirs[1]][:count]
    write_report(directories, inputs.root / "report.html")
    page = Page((inputs.root / "report.html").read_text())
    assert page.open == []
    assert len(page.alts) == 12 * (count + 1)


def test_report_is_written_to_object_store(inputs: ReportInputs) -> None:
    url, directories = "memory://pages/report.html", list(map(str, inputs.eval_dirs))
    report(directories, url, times=None, title=None)
    page = inputs.render()
    assert storage.read_bytes(url).decode() == page
    assert not Path("memory:").exists()


def test_missing_sections_are_omitted_with_reason(inputs: ReportInputs) -> None:
    directory = inputs.eval_dirs[0]
    (directory / "judged.json").unlink()
    (directory / "images" / "000000.tar").unlink()
    rewrite(directory / "scores.json", {"data": str(inputs.root / "gone" / "test")}, "card")
    write_report([directory], inputs.root / "report.html")
    source = (inputs.root / "report.html").read_text()
    (line,) = re.findall(r'<p class="left-out">Left out:(.*)</p>', source)
    for title in ("Conversations", "Attributes", "Training", "Data", "Times"):
        assert re.search(rf"<strong>{title}</strong> \([^<]+\)[;.]", line)
    assert "Attribute accuracy" not in source
    assert re.findall(r'<a href="#(\w+)"', source) == ["scores", "cards"]


def test_undecodable_images_are_marked_in_report(inputs: ReportInputs) -> None:
    directory = inputs.eval_dirs[1]
    with tarfile.open(directory / "images" / "000000.tar", "w") as tar:
        for key in inputs.keys:
            member = tarfile.TarInfo(f"{key}.png")
            member.size = 4
            tar.addfile(member, io.BytesIO(b"nope"))
    assert inputs.render().count('class="no-image"') == 12


def test_read_run_skips_bad_lines_and_keeps_last_of_step(tmp_path: Path) -> None:
    written = ['{"step": 2, "loss": 5}', '{"step": 1, "loss": 9}', '{"step": 2, "loss": 4}']
    written += ['{"step": 3, "loss": NaN}', "[]", '{"step": 4']
    (tmp_path / "metrics.jsonl").write_text("\n".join(written))
    run = read_run(str(tmp_path))
    assert [(line["step"], line["loss"]) for line in run.lines] == [(1, 9), (2, 4)]
    assert run.config == {}


def test_smooth_keeps_flat_curve_and_ticks_are_round() -> None:
    assert smooth([2.0] * 80) == [2.0] * 80
    assert smooth([0.0, 3.0, 6.0]) == [1.5, 3.0, 4.5]
    assert ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(7.0, 7.0) == [7.0]


def test_missing_or_malformed_evaluation_is_rejected(inputs: ReportInputs, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected at least one"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(DataError, match=r"no scores\.json"):
        read_evaluation(tmp_path / "nowhere")
    scores = inputs.eval_dirs[0] / "scores.json"
    scores.write_text(json.dumps({"scores": []}))
    with pytest.raises(DataError, match="expected `scores` and `card`"):
        read_evaluation(inputs.eval_dirs[0])


def test_cases_show_requested_dialogs(inputs: ReportInputs) -> None:
    """In the requested order, including one whose image was saved by one system only."""
    cases = (inputs.keys[-1], inputs.keys[3])
    source = inputs.render(cases=cases)
    assert re.findall(r'<article class="conversation" aria-label="([^"]+)"', source) == list(cases)
    assert source.count("no image saved") == 1
    assert "<title>Cases</title>" in source
    assert re.findall(r'<a href="#(\w+)"', source) == ["conversations", "cards"]


def test_unknown_case_is_one_line_error(inputs: ReportInputs) -> None:
    out = inputs.root / "cases.html"
    done = run_process("report", *inputs.eval_dirs, "--out", out, "--case", "test-99-0-0")
    assert done.returncode == 2
    *others, line = done.stderr.strip().splitlines()
    assert all("not verified" in other for other in others)
    assert "--case test-99-0-0: no instance of" in line
    assert re.search(r"such as test-\d+-0-0$", line)
    for directory in inputs.eval_dirs:
        (directory / "images" / "000000.tar").unlink()
    with pytest.raises(DataError, match=r"no evaluation saved its image.*--save-images all"):
        inputs.render(cases=inputs.keys[:1])
    with pytest.raises(ConfigError, match=r"ending in \.html"):
        write_report(inputs.eval_dirs, inputs.root / "cases.md", cases=inputs.keys[:1])


def test_no_speaker_and_empty_turns_render_no_bubble(tmp_path: Path) -> None:
    """System messages count as turns, but are not shown."""
    turns = [(NO_SPEAKER, ""), (None, "hi"), (None, ""), (NO_SPEAKER, ""), (None, "here")]
    context = [{"speaker": speaker, "text": text} for speaker, text in turns]
    source = {"ref": ["1.jpg"], "sha256": "0", "width": 1, "height": 1, "size_bytes": 1}
    sample = ShownSample({"key": "k", "context": context, "source": source}, "", [], None, b"")
    write_samples_page(str(tmp_path / "page.html"), "data", 1, [sample])
    bubbles = re.findall(r"<li dir=[^>]*>(.*?)</li>", (tmp_path / "page.html").read_text())
    assert [bubble.partition("</span>")[2] for bubble in bubbles] == ["hi", "here"]
    assert speaking_turns(context) == ((0, "hi"), (0, "here"))


def make_success(inputs: ReportInputs, keys: list[str]) -> None:
    """Have the judge read every attribute of some of the last system's images right."""
    path = inputs.eval_dirs[1] / "judged.json"
    judged = json.loads(path.read_text())
    for key in keys:
        judged["examples"][key]["read"] = judged["examples"][key]["wanted"]
    path.write_text(json.dumps(judged))


def test_success_on_corrected_dialog_leads_and_page_says_so(inputs: ReportInputs) -> None:
    hashed = sorted(inputs.keys[:-1], key=lambda key: key_order_hash(key, 0))
    assert "was chosen" not in inputs.render()
    make_success(inputs, hashed[4:6])
    source = inputs.render()
    shown = re.findall(r'<article class="conversation" aria-label="([^"]+)"', source)
    assert shown == [hashed[4], *hashed[:4], *hashed[5:12]]
    assert "The first one was chosen: a turn begins like a correction" in source
    marked = re.findall(r'class="theirs marked"><span[^>]*>[^<]*</span>([^<]+)<', source)
    assert marked == ["no wait, the blue one"] * 12
    kinds = re.findall(r'data-kinds="([^"]+)" style="--rank:(\d+)"', source)
    assert kinds[0] == ("corrected right", "0")
    assert sum("right" in kind for kind, _ in kinds) == 2
    assert sorted(int(rank) for _, rank in kinds) == list(range(12))
    # Every dialog has a correction, so it is no choice.
    assert re.findall(r'<input type="radio" name="[\w-]+-show" class="(\w+)"', source) == [
        "all",
        "right",
        "wrong",
    ]


def test_without_judge_highest_clip_i_leads(inputs: ReportInputs) -> None:
    for directory in inputs.eval_dirs:
        (directory / "judged.json").unlink()
        rows = [
            {"key": key, "status": "ok", "clip_i": 50.0 + number}
            for number, key in enumerate(inputs.keys)
        ]
        (directory / "instances.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = inputs.render()
    shown = re.findall(r'<article class="conversation" aria-label="([^"]+)"', source)
    assert shown[0] == inputs.keys[-2]
    assert "CLIP-I is the highest among such dialogs" in source
    assert 'CLIP-I <data value="63.0" title="63.0">63.0</data>' in source
    assert "Sort by CLIP-I of After" in source
    # A line that is no JSON is one error.
    (inputs.eval_dirs[1] / "instances.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"instances\.jsonl"):
        read_evaluation(inputs.eval_dirs[1]).clip_i  # noqa: B018


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("No wait, the blue one", True),
        ("sorry, i meant at night", True),
        ("actually, it was a ball", True),
        ("hm, rather on the left", True),
        ("oh no, the red one", True),
        ("oh no, that is sad", False),
        ("i actually like it", False),
        ("sorry to hear that", False),
    ],
)
def test_correction_is_told_by_first_words(words: str, expected: bool) -> None:
    assert is_correction(words) == expected


def test_validation_loss_is_plotted_beside_training_loss(inputs: ReportInputs) -> None:
    assert 'class="validation"' not in inputs.render()
    lines: list[dict[str, Any]] = [
        {"step": step, "loss": 0.5 + 1 / step, "bands": {}} for step in (100, 200, 300)
    ]
    path = inputs.root / "run" / "validation.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = inputs.render()
    (path_of_line,) = re.findall(r'<polyline class="validation"[^>]*points="([^"]+)"', source)
    assert len(path_of_line.split()) == source.count("<circle ") == 3
    assert {repr(0.5 + 1 / 100), repr(0.5 + 1 / 300)} <= set(Page(source).values)


def test_images_open_large_without_script(inputs: ReportInputs) -> None:
    source = inputs.render()
    boxes = re.findall(r'<div class="shot" id="([\w-]+)" popover><button[^>]*>', source)
    assert len(set(boxes)) == len(Page(source).alts) == 12 * 3
    assert re.findall(r'popovertarget="([\w-]+)"', source) == boxes


def test_caution_is_beside_its_number(inputs: ReportInputs) -> None:
    few, other = "FID on 15 images is noisy", "IS is biased low"
    for directory in inputs.eval_dirs:
        rewrite(directory / "scores.json", {"warnings": [few, other]})
    source = inputs.render()
    cards = re.findall(
        r'<section class="card"><h2>([\w ]+|CLIP-I)</h2>(.*?)</section>', source, re.S
    )
    assert [title for title, body in cards if few in body] == ["FID"]
    assert [title for title, body in cards if "Not comparable with published" in body] == ["FID"]
    assert source.count(few) == source.count(other) == 1
    assert other not in "".join(body for _, body in cards)


def test_cards_are_folded_and_blank_rows_left_out(inputs: ReportInputs) -> None:
    for directory in inputs.eval_dirs:
        rewrite(directory / "scores.json", {"is": None}, "scores")
    source = inputs.render(times=TIMES)
    folded = re.findall(r'<section id="(\w+)"><details class="folded">', source)
    assert folded == ["data", "times", "cards"]
    assert "Inception Score" not in source
    # The reconstructions were not judged.
    assert "VAE reconstructions" not in source


def test_templates_escape_everything() -> None:
    """No template and no module marks a text as safe, and an unknown name is an error."""
    directory = Path(document.__file__).parent
    for path in [*directory.glob("*.py"), *directory.glob("templates/*.html")]:
        assert not re.search(r"\|\s*safe\b|Markup\(|autoescape\s+false", path.read_text()), path
    made = document.environment()
    assert made.from_string("{{ a }}").render(a="<b>\x07") == "&lt;b&gt;\N{REPLACEMENT CHARACTER}"
    with pytest.raises(UndefinedError):
        made.from_string("{{ a }}").render()
