"""A study as tables: paper numbers next to ours, incomparable rows in separate tables."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from d2i.config import TextConfig
from d2i.errors import ConfigError
from d2i.report import write_report
from d2i.report.paper_rows import PUBLISHED_EXTRACTOR, matching_row, paper_row, row_mismatches
from d2i.shards import Sample, json_bytes, npy_bytes, write_manifest, write_shard

BACKBONES = ("uvit-s", "uvit-s-deep", "unidiffuser-v1")
CATEGORIES = {"people": 55, "food": 40, "animals": 55}
NUM_TEST = 4 * 55
# Sizes of the paper's test splits, and with them of a card that earns the paper's row.
EXPECTED = {"photochat": 1000, "mmdialog": 23772}
PUBLISHED = {"file": "published.pth", "sha256": "ab" * 32, "layout": "published"}
TEXT = TextConfig().model_dump(mode="json")


def text(strategy: str) -> dict[str, Any]:
    return TEXT | {"strategy": strategy}


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (number % 256, 90, 200)).save(buffer, "PNG")
    return buffer.getvalue()


def make_data(directory: Path) -> list[str]:
    moments = npy_bytes(np.zeros((8, 2, 2), np.float16))
    samples = [
        Sample(
            f"test-{number}-0-0",
            {
                "json": json_bytes(
                    {
                        "context": [{"speaker": 0, "text": f"look at {number}"}],
                    }
                ),
                "moments.npy": moments,
                "png": png(number),
            },
        )
        for number in range(NUM_TEST)
    ]
    write_shard(samples, str(directory), 0, failures={})
    write_manifest(str(directory), {})
    return [sample.key for sample in samples]


class Study:
    """Writes evaluations like `d2i eval`, each with its own scores."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.directories: list[Path] = []
        self.keys = {corpus: make_data(root / corpus) for corpus in ("photochat", "mmdialog")}

    def add(self, corpus: str, backbone: str | None, *, run: bool = False, **card: Any) -> Path:
        number = len(self.directories)
        directory = self.root / "eval" / f"{number:02d}"
        (directory / "images").mkdir(parents=True)
        kind = "run" if run else backbone
        values: dict[str, Any] = {
            "label": f"{backbone}, {'' if run else 'not '}fine-tuned",
            "kind": kind,
            "backbone": backbone,
            "run": f"/runs/{backbone}" if run else None,
            "context": "full",
            "text": TEXT,
            "corpus": corpus,
            "split": "test",
            "corpus_options": {},
            "data": str(self.root / corpus),
            "instances_sha256": corpus,
            "extractor": PUBLISHED_EXTRACTOR,
            "weights": {"clip_image": "ab" * 32},
            "expected": EXPECTED[corpus],
            "found": EXPECTED[corpus],
            "resolution": 256,
            "sampler": "dpm_solver",
            "num_steps": 50,
            "guidance_scale": 2.0,
            "guidance_chosen_by": {"how": "given"},
        }
        if backbone:
            values |= {"changed_sizes": {}, "initial_weights": PUBLISHED}
        if run:
            values |= {"trained_text": card.get("text", TEXT), "trained_corpus": corpus}
        scores = {name: 10.0 + number + 0.1 * i for i, name in enumerate(SCORES)}
        intervals = {"fid": [scores["fid"] - 1, scores["fid"] + 1]}
        document = {"scores": scores, "intervals": intervals, "card": values | card}
        (directory / "scores.json").write_text(json.dumps(document))
        if corpus == "photochat":
            document = categories_of(number, self.keys[corpus])
            (directory / "categories.json").write_text(json.dumps(document))
        with tarfile.open(directory / "images" / "0.tar", "w") as tar:
            for key in self.keys[corpus]:
                member = tarfile.TarInfo(f"{key}.png")
                member.size = len(png(number))
                tar.addfile(member, io.BytesIO(png(number)))
        self.directories.append(directory)
        return directory

    def write(self, name: str, **options: Any) -> str:
        write_report(self.directories, self.root / name, **options)
        return (self.root / name).read_text()

    def lines(self) -> list[dict[str, str]]:
        return list(csv.DictReader(io.StringIO(self.write("tables.csv"))))


def categories_of(number: int, keys: list[str]) -> dict[str, Any]:
    """Return categories.json as `d2i eval` writes it; food has fewer than 50 instances."""
    return {
        "num_instances": NUM_TEST,
        "num_in_two": 7,
        "num_draws": 20,
        "draw_size": 50,
        "categories": [
            {
                "name": name,
                "num_instances": size,
                "num_pictures": size,
                "keys": keys[offset::4][:50],
                "fid": 200.0 + number,
                "fid_std": None if size < 50 else 3.0,
                "is": 2.0,
                "is_std": None if size < 50 else 0.25,
                "kid_paired": 0.0125,
                "clip_i": 99.5,
                "clip_i_interval": [98.5, 100.0],
            }
            for offset, (name, size) in enumerate(CATEGORIES.items())
        ],
    }


SCORES = (
    "fid",
    "is",
    "is_std",
    "clip_i",
    "clip_t",
    "fid_clip",
    "recall_1",
    "recall_5",
    "recall_10",
)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Three backbones, two corpora, before and after; four linearizations; four contexts."""
    study = Study(tmp_path_factory.mktemp("study"))
    for corpus in ("photochat", "mmdialog"):
        for backbone in BACKBONES:
            study.add(corpus, backbone)
            study.add(corpus, backbone, run=True)
    for strategy in ("letters", "special", "space"):
        study.add("photochat", "unidiffuser-v1", run=True, text=text(strategy))
    for context in ("none", "shuffled", "last"):
        study.add("mmdialog", "uvit-s", run=True, context=context)
    study.add("mmdialog", None, kind="divter", label="Divter", found=23769)
    study.add("mmdialog", None, kind="images", label="MiniGPT-5", codec="jpg files")
    return study


def value(lines: list[dict[str, str]], table: str, row: str, column: str) -> str | None:
    found = [
        line["value"]
        for line in lines
        if (line["table"], line["row"], line["column"]) == (table, row, column)
    ]
    assert len(found) <= 1
    return found[0] if found else None


def test_table_2_has_paper_numbers_next_to_ours(study: Study) -> None:
    lines = study.lines()
    table = "Systems on PhotoChat (Table 2)"
    assert value(lines, table, "U-ViT-Small", "FID") == "10.0"
    assert value(lines, table, "U-ViT-Small", "FID (paper)") == "97.76"
    assert value(lines, table, "UniDiffuser-v1 + ours", "CLIP-I (paper)") == "61.82"
    assert value(lines, table, "UniDiffuser-v1 + ours", "FID") == "15.0"
    # A system of the paper that was not evaluated, and a value illegible in the paper.
    assert value(lines, table, "DALL-E 2", "FID") is None
    assert value(lines, table, "DALL-E 2", "FID (paper)") == "124.1"
    assert value(lines, table, "DALL-E 2", "CLIP-I (paper)") is None
    assert {line["by"] for line in lines if "(paper)" in line["column"]} == {"paper"}
    (uvit,) = [
        line
        for line in lines
        if (line["table"], line["row"], line["column"]) == (table, "U-ViT-Small", "FID")
    ]
    assert (uvit["low"], uvit["high"]) == ("9.0", "11.0")
    assert "dpm_solver 50 steps, guidance 2 (given)" in uvit["card"]
    assert "not the paper's row" not in uvit["card"]


@pytest.mark.parametrize(("kind", "label"), [("dalle2", "DALL-E 2"), ("unclip", "DALL·E 2")])
def test_unclip_is_never_labelled_dalle_2(tmp_path: Path, kind: str, label: str) -> None:
    """Also when an older evaluation uses that label."""
    study = Study(tmp_path)
    study.add("photochat", None, kind=kind, label=label)
    lines, table = study.lines(), "Systems on PhotoChat (Table 2)"
    assert value(lines, table, "unCLIP (Karlo)", "FID") == "10.0"
    assert value(lines, table, "unCLIP (Karlo)", "FID (paper)") is None
    assert value(lines, table, "DALL-E 2", "FID") is None
    assert value(lines, table, "DALL-E 2", "FID (paper)") == "124.1"
    assert "unCLIP (Karlo)" in study.write("page.html")


def test_table_2_has_row_for_every_paper_system(study: Study) -> None:
    lines = study.lines()
    mmdialog = {line["row"] for line in lines if line["table"] == "Systems on MMDialog (Table 2)"}
    backbones = {"U-ViT-Small", "U-ViT-Small(Deep)", "UniDiffuser-v1"}
    assert mmdialog == backbones | {f"{name} + ours" for name in backbones} | {
        *("DALL-E 2", "MiniGPT-5", "Divter, our captions")
    }
    table = "Systems on MMDialog (Table 2)"
    assert value(lines, table, "Divter, our captions", "images") == "23769 of 23772"
    assert value(lines, table, "Divter, our captions", "IS (paper)") == "20.53"


def test_incomparable_rows_are_in_separate_table_with_reason(study: Study) -> None:
    text = study.write("tables.md")
    assert "Systems on MMDialog (Table 2), not comparable" in text
    assert "Not comparable with the first table: codec jpg files instead of not recorded." in text
    separate_tables = text[text.index("(Table 2), not comparable") :]
    assert "|MiniGPT-5|" in separate_tables[: separate_tables.index("##")]
    assert "trained on our captions" in text


def test_lossless_codecs_stay_in_main_table(tmp_path: Path) -> None:
    """PNG images, and the retrieval baseline, whose photographs have the codec of the corpus."""
    study = Study(tmp_path)
    study.add("mmdialog", "uvit-s", codec="none: pictures stay in memory from sampler to metric")
    study.add("mmdialog", None, kind="images", label="MiniGPT-5", codec="png files")
    study.add("mmdialog", None, kind="retrieve", label="nearest", codec="jpg, png files")
    study.add("mmdialog", None, kind="images", label="other", codec="jpg, png files")
    table = "Systems on MMDialog (Table 2)"
    scored = {
        line["row"]
        for line in study.lines()
        if line["table"] == table and line["column"] == "CLIP-I"
    }
    assert scored == {"U-ViT-Small", "MiniGPT-5", "nearest"}
    assert "codec jpg files instead of lossless" in study.write("tables.md")


def test_paper_numbers_are_shown_in_every_table_of_its_metric(tmp_path: Path) -> None:
    """Also in a separate table of one system; systems not evaluated are listed once."""
    study = Study(tmp_path)
    for backbone in BACKBONES:
        study.add("mmdialog", backbone, extractor="clip_image 0123")
    study.add("mmdialog", "uvit-s", run=True)
    study.add("mmdialog", "unidiffuser-v1", run=True, device="cuda")
    lines, table = study.lines(), "Systems on MMDialog (Table 2)"
    ours = "Systems on MMDialog"
    assert value(lines, ours, "uvit-s, not fine-tuned", "FID") == "10.0"
    assert value(lines, ours, "uvit-s, not fine-tuned", "FID (paper)") is None
    assert value(lines, f"{table}, not comparable", "U-ViT-Small + ours", "FID (paper)") == "23.9"
    assert value(lines, f"{table}, not comparable", "U-ViT-Small", "FID (paper)") == "52.95"
    by_cuda = [line["row"] for line in lines if line["table"] == f"{table}, not comparable (2)"]
    assert set(by_cuda) == {"UniDiffuser-v1 + ours"}
    assert value(lines, f"{table}, not comparable (2)", by_cuda[0], "FID (paper)") == "22.72"


@pytest.mark.parametrize(
    ("label", "row"),
    [("minigpt5", "MiniGPT-5"), ("DALL·E 2", "DALL-E 2"), ("divter", "Divter"), ("note", "note")],
)
def test_label_maps_to_paper_row(label: str, row: str) -> None:
    assert paper_row(CARD | {"backbone": None, "kind": "images", "label": label}) == row


CARD: dict[str, Any] = {
    "label": "uvit-s, fine-tuned",
    "kind": "run",
    "backbone": "uvit-s",
    "run": "/runs/a",
    "corpus": "photochat",
    "split": "test",
    "corpus_options": {},
    "expected": 1000,
    "found": 860,
    "extractor": PUBLISHED_EXTRACTOR,
    "changed_sizes": {},
    "initial_weights": PUBLISHED,
    "text": TEXT,
    "trained_text": TEXT,
    "trained_corpus": "photochat",
}
_SMALL = {"depth": [3, 12], "dim": [32, 512], "patch_size": [4, 2]}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"changed_sizes": _SMALL},
            "3 blocks of width 32, published 12 of 512; patch_size 4, published 2",
        ),
        ({"changed_sizes": {"depth": [16, 12]}}, "depth 16, published 12"),
        ({"initial_weights": None}, "its initial weights are random"),
        ({"initial_weights": {"file": "scratch"}}, "its initial weights are random"),
        (
            {"initial_weights": PUBLISHED | {"initialisation": True}},
            "its initial weights are untrained, an initialisation",
        ),
        (
            {"initial_weights": {"file": "x.pth", "layout": None}},
            "its initial weights, x.pth, are not in a published layout",
        ),
        ({"text": TEXT | {"keep": "start"}}, "evaluated with text.keep=start, the paper's end"),
        (
            {"trained_text": TEXT | {"max_turns": 4, "num_windows": 2}},
            "trained with text.max_turns=4, the paper's null; "
            "trained with text.num_windows=2, the paper's 1",
        ),
        (
            {"trained_text": TEXT | {"strategy": "space"}},
            "trained with text.strategy=space, the paper's hash",
        ),
        ({"trained_corpus": "jsonl"}, "trained on jsonl"),
        ({"corpus": "made world"}, "the corpus is made world"),
        (
            {"extractor": "clip_image 0123"},
            "extractor clip_image 0123, the paper's inception-v3-compat 6726825d",
        ),
        ({"split": "valid"}, "the split is valid"),
        ({"expected": 20, "found": 20}, "20 test instances, the paper's 1,000"),
        ({"found": 700}, "only 700 of 1,000 instances were scored"),
        (
            {"corpus_options": {"direction": "first"}},
            "instances were prepared with corpus.direction=first",
        ),
    ],
)
def test_paper_row_requires_setup_of_paper(change: dict[str, Any], reason: str) -> None:
    assert matching_row(CARD) == paper_row(CARD) == "U-ViT-Small + ours"
    assert row_mismatches(CARD) == []
    card = CARD | change
    assert matching_row(card) is None
    assert paper_row(card) == "uvit-s, fine-tuned"
    assert "; ".join(row_mismatches(card)) == reason


def test_backward_compatibility_old_card_earns_no_paper_row(tmp_path: Path) -> None:
    """Old cards recorded neither sizes, initial weights nor the text of training."""
    study = Study(tmp_path)
    directory = study.add("photochat", "uvit-s", run=True)
    document = json.loads((directory / "scores.json").read_text())
    for field in (
        *("changed_sizes", "initial_weights", "trained_text", "trained_corpus"),
        *("corpus_options", "guidance_chosen_by"),
    ):
        del document["card"][field]
    (directory / "scores.json").write_text(json.dumps(document))
    lines = study.lines()
    table = "Systems on PhotoChat (Table 2)"
    assert value(lines, table, "uvit-s, fine-tuned", "FID") == "10.0"
    assert value(lines, table, "U-ViT-Small + ours", "FID") is None
    assert value(lines, table, "U-ViT-Small + ours", "FID (paper)") == "86.27"
    reason = (
        "uvit-s, fine-tuned: not the paper's row: its sizes are not recorded; its initial weights "
        "are not recorded; the corpus that it was trained on is not recorded; the text that it was "
        "trained on is not recorded."
    )
    assert reason in study.write("tables.md")
    (card,) = {line["card"] for line in lines if line["by"] == "d2i" and line["table"] == table}
    assert reason.partition(": ")[2].rstrip(".") in card
    # Without the split, the paper's numbers are omitted from the whole table.
    del document["card"]["split"]
    (directory / "scores.json").write_text(json.dumps(document))
    assert "numbers are omitted: the split is not recorded." in study.write("tables.md")


def test_label_alone_earns_no_paper_row() -> None:
    """Neither --label nor other weights of the DALL-E 2 kind earn a row of the paper."""
    small = CARD | {"changed_sizes": _SMALL, "label": "U-ViT-Small + ours"}
    assert paper_row(small) == "U-ViT-Small + ours, not the paper's"
    of_images = small | {"backbone": None, "kind": "images", "run": None}
    assert paper_row(of_images) == "U-ViT-Small + ours, not the paper's"
    karlo = CARD | {"backbone": None, "kind": "dalle2", "run": None, "label": "DALL-E 2"}
    assert paper_row(karlo) == "unCLIP (Karlo)"
    assert "unCLIP (Karlo)" in row_mismatches(karlo)[0]


def test_gains_are_shown_next_to_paper_gains(tmp_path: Path) -> None:
    study = Study(tmp_path)
    study.add("photochat", "unidiffuser-v1")
    study.add("photochat", "unidiffuser-v1", run=True)
    # Another network and another text: neither is the baseline of the fine-tuned system.
    study.add("photochat", "unidiffuser-v1", changed_sizes=_SMALL)
    study.add("photochat", "unidiffuser-v1", text=TEXT | {"keep": "start"})
    study.add("photochat", "uvit-s", run=True)
    lines, table = study.lines(), "Systems on PhotoChat (Table 2)"
    row = "UniDiffuser-v1 + ours"
    assert value(lines, table, row, "FID gain") == "1.0"
    assert value(lines, table, row, "FID gain (paper)") == "-37.49"
    assert value(lines, table, row, "CLIP-I gain (paper)") == "11.23"
    assert value(lines, table, "U-ViT-Small + ours", "FID gain") is None
    assert value(lines, table, "U-ViT-Small + ours", "IS gain (paper)") == "1.7"
    assert value(lines, table, "UniDiffuser-v1", "FID gain (paper)") is None
    assert "|+1.00|-37.49|" in study.write("tables.md")


def test_inconsistencies_of_paper_numbers_are_noted(study: Study) -> None:
    for name in ("tables.md", "tables.html"):
        written = study.write(name)
        for words in ("gain of +10.63; the difference is 11.23", "42.18", "104.14", "Tables 2, 3"):
            assert words in written, (name, words)
    cards = {
        (line["row"], line["column"]): line["card"]
        for line in study.lines()
        if line["by"] == "paper" and "MMDialog" not in line["table"]
    }
    assert "+10.63" in cards["UniDiffuser-v1 + ours", "CLIP-I (paper)"]
    assert "42.18" in cards["Divter", "FID (paper)"]
    assert cards["U-ViT-Small", "FID (paper)"] == "the paper, Table 2"
    assert "104.14" in cards["special", "IS (paper)"]


def test_row_states_source_of_guidance(tmp_path: Path) -> None:
    study = Study(tmp_path)
    chosen = {"how": "select", "metric": "fid", "num_instances": 1000}
    study.add("photochat", "uvit-s", run=True, guidance_scale=3.0, guidance_chosen_by=chosen)
    study.add("photochat", "uvit-s", guidance_chosen_by={"how": "recipe"})
    lines, table = study.lines(), "Systems on PhotoChat (Table 2)"
    words = "3 (d2i select, FID on 1000 validation dialogs)"
    assert value(lines, table, "U-ViT-Small + ours", "guidance") == words
    assert value(lines, table, "U-ViT-Small", "guidance") == "2 (recipe)"
    assert any(f"guidance {words};" in line["card"] for line in lines)


def test_rows_of_same_name_are_disambiguated_by_directory(tmp_path: Path) -> None:
    study = Study(tmp_path)
    for strategy in ("hash", "letters", "letters"):
        study.add("photochat", "uvit-s", run=True, text=text(strategy))
    lines = [line for line in study.lines() if line["column"] == "FID"]
    of_table_3 = [line["row"] for line in lines if line["table"].startswith("Linearizations")]
    assert of_table_3 == ["letters (01)", "letters (02)", "hash"]


def test_repeated_warning_is_shown_once(study: Study) -> None:
    for directory in study.directories[1:]:
        document = json.loads((directory / "scores.json").read_text())
        (directory / "scores.json").write_text(
            json.dumps(document | {"warnings": ["few pictures"]})
        )
    source = study.write("warned.html", parts=("cards",))
    assert source.count("few pictures") == 1
    assert "and 15 more: few pictures." in source
    assert '<th scope="col">uvit-s, fine-tuned (01)</th>' in source


def test_table_3_and_context_ablation_have_expected_rows(study: Study) -> None:
    lines = study.lines()
    name = "Linearizations: UniDiffuser-v1 + ours on PhotoChat (Table 3)"
    assert [line["row"] for line in lines if line["table"] == name and line["column"] == "FID"] == [
        "space",
        "special",
        "letters",
        "hash",
    ]
    assert value(lines, name, "space", "FID (paper)") == "69.92"
    assert value(lines, name, "letters", "FID (paper)") is None
    shown = "Context ablation: U-ViT-Small + ours on MMDialog"
    assert [
        line["row"] for line in lines if line["table"] == shown and line["column"] == "FID"
    ] == ["full", "last", "none", "shuffled"]


def test_strategy_changed_at_test_time_is_not_table_3(tmp_path: Path) -> None:
    study = Study(tmp_path)
    for strategy in ("hash", "space"):
        study.add(
            *("photochat", "unidiffuser-v1"), run=True, text=text(strategy), trained_text=TEXT
        )
        study.add("photochat", "uvit-s", text=text(strategy))
    tables = {line["table"] for line in study.lines() if line["table"].startswith("Linearizations")}
    start = "Linearizations, changed at test time only"
    assert tables == {
        f"{start}: unidiffuser-v1, fine-tuned on PhotoChat",
        f"{start}: uvit-s, not fine-tuned on PhotoChat",
    }
    assert not [x for x in study.lines() if x["table"].startswith(start) and x["by"] == "paper"]
    assert "not the paper's experiment" in study.write("tables.md")


def test_figure_5_shows_deviation_over_draws(study: Study) -> None:
    table = "People: 55 instances (Figure 5)"
    lines = [line for line in study.lines() if line["table"] == table]
    fid = [line for line in lines if line["column"] == "FID"]
    assert (fid[0]["value"], fid[0]["deviation"], fid[0]["low"]) == ("200.0", "3.0", "")
    clip_i = [line for line in lines if line["column"] == "CLIP-I"]
    assert (clip_i[0]["low"], clip_i[0]["high"]) == ("98.5", "100.0")
    # One row for each system, with its full label.
    assert len({line["row"] for line in fid}) == len(fid) == 6
    source = study.write("tables.md")
    assert "200.00 ± 3.00" in source
    assert "mean ± standard deviation over 20 seeded draws of 50 images" in source
    assert "FID on 50 images in 2,048 dimensions has rank 49" in source
    assert "7 instances are in two or more categories and scored in each of them." in source
    assert "fewer than 50 instances, all of them used: food (40)." in source


def test_figure_5_skips_evaluations_without_categories(tmp_path: Path) -> None:
    study = Study(tmp_path)
    directories = [study.add("photochat", backbone) for backbone in BACKBONES]
    (directories[0] / "categories.json").unlink()
    source = study.write("one.html")
    assert f"No categories.json (eval/figure5.py writes it) in: {directories[0]}." in source
    assert source.count("<h3>people</h3>") == 1
    for directory in directories[1:]:
        (directory / "categories.json").unlink()
    assert "no evaluation has categories.json; eval/figure5.py writes it" in study.write("no.html")


def test_table_5_lists_recipes(study: Study) -> None:
    lines = study.lines()
    row = "MMDialog, U-ViT-Small"
    for column in ("global batch", "global batch (paper)"):
        assert value(lines, "Recipes (Table 5)", row, column) == "4096.0"
    assert value(lines, "Recipes (Table 5)", row, "devices (paper)") == "8x A100-80GB"


def test_study_page_is_complete_and_self_contained(study: Study) -> None:
    source = study.write("study.html")
    opened = list(unclosed_tags(source))
    assert opened == []
    for anchor in ("table2", "table3", "listening", "figure5", "table5", "conversations", "cards"):
        assert f'<section id="{anchor}">' in source
    assert 'title="97.76; the paper, Table 2"' in source
    # Scrollable regions have a label; no heading is empty.
    assert 'role="region" aria-label="Systems on PhotoChat (Table 2)"' in source
    # The tables have every score, so they are not shown side by side once more.
    assert '<section id="scores">' not in source
    assert '<th scope="col"></th>' not in source
    assert "photochat" in source
    # Systems of a corpus are shown next to its reference images: 12 dialogs each.
    assert source.count('<article class="conversation"') == 12 + 12 + 3 * 4
    assert [source.count(f"<h3>{corpus}</h3>") for corpus in ("PhotoChat", "MMDialog")] == [1, 1]
    assert len(study.directories) == 20
    only = study.write("figure5.html", parts=("figure5",))
    assert '<section id="figure5">' in only
    assert "Table 2" not in only


def unclosed_tags(source: str) -> Iterator[str]:
    class Page(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert all(not (n == "src" and not (v or "").startswith("data:")) for n, v in attrs)
            if tag not in ("meta", "img"):
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    page = Page()
    page.feed(source)
    yield from page.open


def test_paper_numbers_are_omitted_for_other_extractor(tmp_path: Path) -> None:
    study = Study(tmp_path)
    study.add("mmdialog", "uvit-s", extractor="clip_image 0123")
    systems = [line for line in study.lines() if line["table"].startswith("Systems")]
    assert systems
    assert {line["by"] for line in systems} == {"d2i"}
    assert "The paper's numbers are omitted" in study.write("tables.md")


def test_unknown_report_suffix_is_rejected(study: Study) -> None:
    with pytest.raises(ConfigError, match=r"ending in \.html, \.md or \.csv"):
        study.write("tables.pdf")
