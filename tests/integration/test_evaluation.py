"""An evaluation gives one result for any workers, task sizes, kills and restarts."""

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
from tests.integration.evaluations import assert_same, command, images_by_name
from tests.integration.logged import LOG
from tests.processes import run_d2i, run_process

POINTS = ("eval.task_drawn", "eval.pictures_written", "eval.task_written", "eval.task_done")


@pytest.fixture
def generation_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that records the key of every generated image."""
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
def test_evaluation_does_not_depend_on_workers_and_task_size(
    tmp_path: Path, chat_data: Path, whole: Path, generation_log: Path, workers: int, task_size: int
) -> None:
    run_d2i(*command(chat_data, tmp_path / "out", *on_ray(workers, task_size)))
    assert_same(tmp_path / "out", whole)
    assert set(times_generated(generation_log).values()) == {1}


def test_evaluation_resumes_after_sigkill_at_every_fault_point(
    tmp_path: Path, chat_data: Path, whole: Path, generation_log: Path
) -> None:
    """Each attempt resumes the one before, with another task size."""
    for task_size, point in enumerate(POINTS, start=2):
        killed = run_process(
            *command(
                chat_data, tmp_path / "out", "--task-size", task_size, "--fault", f"{point}:kill:2"
            )
        )
        assert killed.returncode == -signal.SIGKILL, (point, killed.stderr)
    run_d2i(*command(chat_data, tmp_path / "out"))
    assert_same(tmp_path / "out", whole)
    # Only unwritten tasks in progress are generated again: one of 2 images and one of 3.
    again = {key for key, times in times_generated(generation_log).items() if times > 1}
    assert len(again) == 2 + 3


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20))
def test_evaluation_resumes_after_random_kills(
    tmp_path: Path, chat_data: Path, whole: Path, generation_log: Path, seed: int
) -> None:
    """The driver is killed, then a worker, at fault points drawn from a seed."""
    rng, out = random.Random(seed), tmp_path / "out"
    in_hand = 0
    # At least two of eight tasks are left when the driver dies: some worker passes its point.
    for point, nth in (("eval.task_done", rng.randint(1, 4)), (rng.choice(POINTS[:3]), 1)):
        workers, task_size = rng.choice((1, 2)), rng.choice((2, 3))
        fault = f"{point}:kill:{nth}"
        before = processes(generation_log)
        done = run_process(*command(chat_data, out, *on_ray(workers, task_size), "--fault", fault))
        # A dead worker is replaced; a dead driver ends the job.
        ended = -signal.SIGKILL if point == "eval.task_done" else 0
        assert done.returncode == ended, done.stderr
        # A process that died had at most one task in progress.
        in_hand += task_size * len(processes(generation_log) - before)
    run_d2i(*command(chat_data, out))
    assert_same(out, whole)
    times = times_generated(generation_log)
    assert len(times) == len(images_by_name(out))
    assert sum(times.values()) - len(times) <= in_hand


def test_fid_and_recall_of_few_images_have_warnings(whole: Path) -> None:
    """Each metric has an interval within its bounds, and a warning where the sample is small."""
    found = json.loads((whole / "scores.json").read_text())
    scores, said = found["scores"], "\n".join(found["warnings"])
    assert scores["num_dialogs"] == found["card"]["found"]
    assert set(found["intervals"]) == {key for key in METRICS if METRICS[key].interval}
    for key, (low, high) in found["intervals"].items():
        lowest, highest = METRICS[key].bounds
        assert lowest <= low < high <= highest, key
        assert low <= scores[key] <= high, key
    # The usual KID estimate, comparable with published scores, differs from the paired one.
    assert scores["kid"] != scores["kid_paired"]
    num = found["card"]["found"]
    assert f"FID on {num} images is noisy and biased" in said
    assert f"recall is among {num - 1} negatives instead of 999" in said
    assert f"IS over 10 splits of {num // 10} images" in said


@pytest.mark.usefixtures("generation_log")
def test_is_and_recall_of_too_few_images_are_not_scored(tmp_path: Path, whole: Path) -> None:
    """Three images of two dialogs: too few for IS splits and for recall@5 and recall@10."""
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
    # The report has the row of the other evaluation alone, and says why.
    path = tmp_path / "report.html"
    run_d2i("report", scores, whole, "--out", path)
    page = path.read_text()
    assert len(re.findall(r"<tr><th[^>]*>Inception Score", page)) == 1
    assert "IS is not scored: each of 3 splits of 3 images has one image" in page


def write_dialogs(directory: Path, nums_images: list[int]) -> None:
    """Write chats as JSONL, each with the given number of noise images."""
    rng, lines = np.random.default_rng(0), []
    for number, num_images in enumerate(nums_images):
        turns = []
        for image in range(num_images):
            name = f"{number}-{image}.png"
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(directory / name)
            turns += [{"text": f"a red ball {number}?"}, {"text": "here", "images": [name]}]
        lines.append(json.dumps({"id": f"chat-{number}", "turns": turns}))
    (directory / "test.jsonl").write_text("\n".join(lines))


def times_generated(log: Path) -> Counter[str]:
    return Counter(line.split()[0] for line in log.read_text().splitlines())


def processes(log: Path) -> set[str]:
    return {line.split()[1] for line in log.read_text().splitlines()} if log.exists() else set()
