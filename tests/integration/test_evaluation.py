"""One evaluation has one result, whoever does it, in whatever portions, however often killed."""

from __future__ import annotations

import json
import random
import re
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2i.metric_specs import METRICS
from tests.integration.commands import preprocess
from tests.integration.evaluations import assert_same, command, pictures
from tests.integration.logged import LOG
from tests.processes import run_d2i, run_process

POINTS = ("eval.task_drawn", "eval.pictures_written", "eval.task_written", "eval.task_done")


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which every drawn key is written down."""
    monkeypatch.setenv(LOG, str(tmp_path / "drawn.txt"))
    return tmp_path / "drawn.txt"


def on_ray(workers: int, task_size: int) -> tuple[object, ...]:
    return "--parallel", "--workers", workers, "--task-size", task_size


@pytest.mark.parametrize(
    ("workers", "task_size"),
    [
        pytest.param(1, 1, marks=pytest.mark.soak),
        (2, 3),
        pytest.param(4, 7, marks=pytest.mark.soak),
    ],
)
def test_workers_and_task_sizes_change_nothing(
    tmp_path: Path, chat_data: Path, whole: Path, drawn: Path, workers: int, task_size: int
) -> None:
    run_d2i(*command(chat_data, tmp_path / "out", *on_ray(workers, task_size)))
    assert_same(tmp_path / "out", whole)
    assert set(times_drawn(drawn).values()) == {1}


def test_killed_at_every_named_point(
    tmp_path: Path, chat_data: Path, whole: Path, drawn: Path
) -> None:
    """Each time going on from the time before, with portions of another size."""
    for task_size, point in enumerate(POINTS, start=2):
        killed = run_process(
            *command(
                chat_data, tmp_path / "out", "--task-size", task_size, "--fault", f"{point}:kill:2"
            )
        )
        assert killed.returncode == -signal.SIGKILL, (point, killed.stderr)
    run_d2i(*command(chat_data, tmp_path / "out"))
    assert_same(tmp_path / "out", whole)
    # Drawn again is what was in hand and not yet written: a portion of 2 and one of 3.
    again = {key for key, times in times_drawn(drawn).items() if times > 1}
    assert len(again) == 2 + 3


@pytest.mark.timeout(900)
def test_killed_drivers_and_workers_on_ray(
    tmp_path: Path, chat_data: Path, whole: Path, drawn: Path
) -> None:
    check_random_kills(tmp_path / "out", chat_data, whole, drawn, seed=1)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20))
def test_random_kills(tmp_path: Path, chat_data: Path, whole: Path, drawn: Path, seed: int) -> None:
    check_random_kills(tmp_path / "out", chat_data, whole, drawn, seed)


def check_random_kills(out: Path, data: Path, whole: Path, drawn: Path, seed: int) -> None:
    """Kill the driver, then a worker, at points and times that a seed draws."""
    dice = random.Random(seed)
    in_hand = 0
    # Of eight tasks at least, two are left when the driver dies: some worker passes its point.
    for point, nth in (("eval.task_done", dice.randint(1, 4)), (dice.choice(POINTS[:3]), 1)):
        workers, task_size = dice.choice((1, 2)), dice.choice((2, 3))
        fault = f"{point}:kill:{nth}"
        before = processes(drawn)
        done = run_process(*command(data, out, *on_ray(workers, task_size), "--fault", fault))
        # A dead worker is replaced; without its driver the job ends.
        ended = -signal.SIGKILL if point == "eval.task_done" else 0
        assert done.returncode == ended, done.stderr
        # A process that died had at most one task in hand.
        in_hand += task_size * len(processes(drawn) - before)
    run_d2i(*command(data, out))
    assert_same(out, whole)
    times = times_drawn(drawn)
    assert len(times) == len(pictures(out))
    assert sum(times.values()) - len(times) <= in_hand


def test_scores_of_few_images_say_how_little_they_say(whole: Path) -> None:
    """Intervals by metric, within what a score can be, and a warning for each that is few."""
    found = json.loads((whole / "scores.json").read_text())
    scores, said = found["scores"], "\n".join(found["warnings"])
    assert scores["num_dialogs"] == found["card"]["found"]
    assert set(found["intervals"]) == {key for key in METRICS if METRICS[key].interval}
    for key, (low, high) in found["intervals"].items():
        lowest, highest = METRICS[key].bounds
        assert lowest <= low < high <= highest, key
        assert low <= scores[key] <= high, key
    # The usual estimate, whose number is comparable with others', is below it.
    assert scores["kid"] != scores["kid_paired"]
    num = found["card"]["found"]
    assert f"FID on {num} images is noisy and biased" in said
    assert f"recall is among {num - 1} negatives instead of 999" in said
    assert f"IS over 10 splits of {num // 10} images" in said


@pytest.mark.usefixtures("drawn")
def test_what_cannot_differ_is_not_scored(tmp_path: Path, whole: Path) -> None:
    """Three images of two dialogs: IS of one image a split, and recall among the first five."""
    write_dialogs(tmp_path, [2, 1])
    preprocess("jsonl", tmp_path, tmp_path / "data", "--split", "test")
    scores = tmp_path / "scores"
    words = [word for word in command(tmp_path / "data", scores) if word != "--json"]
    done = run_process(*words)
    assert done.returncode == 0, done.stderr
    found = json.loads((scores / "scores.json").read_text())
    assert found["scores"]["num_dialogs"] == 2
    for key in ("is", "is_std", "recall_5", "recall_10"):
        assert found["scores"][key] is None
        assert key not in found["intervals"]
        assert f"  {key} " not in done.stdout
    assert "warning: IS is not scored: each of 3 splits of 3 images has one image" in done.stdout
    assert "warning: recall@5 and recall@10 not scored: with 2 negatives" in done.stdout
    assert "warning: scores over 2 dialogs are unreliable" in done.stdout
    page = tmp_path / "report.html"
    run_d2i("report", scores, whole, "--out", page)
    rows = re.findall(r"<tr><th[^>]*>Inception Score.*?</tr>", page.read_text())
    assert sum("not scored" in row for row in rows) == 1


def write_dialogs(folder: Path, nums_images: list[int]) -> None:
    """Write chats in JSONL, each with so many images, of noise."""
    dice, lines = np.random.default_rng(0), []
    for number, num_images in enumerate(nums_images):
        turns = []
        for image in range(num_images):
            name = f"{number}-{image}.png"
            Image.fromarray(dice.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / name)
            turns += [{"text": f"a red ball {number}?"}, {"text": "here", "images": [name]}]
        lines.append(json.dumps({"id": f"chat-{number}", "turns": turns}))
    (folder / "test.jsonl").write_text("\n".join(lines))


def times_drawn(log: Path) -> Counter[str]:
    return Counter(line.split()[0] for line in log.read_text().splitlines())


def processes(log: Path) -> set[str]:
    return {line.split()[1] for line in log.read_text().splitlines()} if log.exists() else set()
