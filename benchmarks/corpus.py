"""Time to read and plan MMDialog, compared with a bare `orjson.loads` of the same lines.

    python benchmarks/corpus.py --repeats 3

Writes a corpus in MMDialog's layout and full size to a directory that is removed afterwards:
1,059,117 training dialogs with 2.7 million image names, and 10,000 validation dialogs with
999 + 999 negative candidates each (1.25 GB). No images are stored. Every figure is measured in a
separate process, alternately: the bare loop, `read_instances`, the plan of 1,000,000 instances and
that of all as Parquet, and `read_instances` over the validation file. Prints one JSON line:
wall-clock seconds, medians and all repeats, their ratios to the bare loop of the same repeat, and
peak memory.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson

NUM_TRAIN, NUM_VALID = 1_059_117, 10_000
NUM_KEYS = 1_750_000
"""Images to choose from: about 1.4 million of them are then named, each 1.9 times."""
NUM_PLANNED = 1_000_000
NUM_NEGATIVES = 999


class Maker:
    """Draws random dialogs of about 4.6 turns of 100 characters and 2.6 images, as in MMDialog."""

    def __init__(self, num_train: int) -> None:
        self.dice = random.Random(0)
        letters = "etaoinshrdlucmfw"
        words = [
            "".join(self.dice.choices(letters, k=self.dice.randint(2, 9))) for _ in range(20_000)
        ]
        self.texts = [
            " ".join(self.dice.choices(words, k=self.dice.randint(4, 28))) for _ in range(50_000)
        ]
        num_keys = max(NUM_KEYS * num_train // NUM_TRAIN, NUM_NEGATIVES)
        self.keys = [str(self.dice.getrandbits(64) - 2**63) for _ in range(num_keys)]

    def dialog(self, number: int) -> dict[str, Any]:
        """Return one random record."""
        choose = self.dice.choice
        turns: list[list[dict[str, str]]] = [
            [{"__TEXT__": choose(self.texts)}] for _ in range(choose((3, 4, 4, 5, 5, 5, 6)))
        ]
        for _ in range(choose((1, 2, 2, 3, 3, 3, 4))):
            choose(turns).append({"__MEDIA__": choose(self.keys)})
        return {"conversation_id": number, "conversation": [{"turn": turn} for turn in turns]}

    def with_negatives(self, number: int) -> dict[str, Any]:
        """Return one random record of a validation or test file."""
        return self.dialog(number) | {
            "negative_candidate_media_keys": self.dice.sample(self.keys, NUM_NEGATIVES),
            "negative_candidate_texts": self.dice.sample(self.texts, NUM_NEGATIVES),
        }


def make_corpus(directory: Path, num_train: int, num_valid: int) -> None:
    """Write both splits."""
    maker = Maker(num_train)
    parts = {
        "train": map(maker.dialog, range(num_train)),
        "valid": map(maker.with_negatives, range(num_valid)),
    }
    for split, records in parts.items():
        path = directory / split / "conversations.json"
        path.parent.mkdir(parents=True)
        with path.open("wb") as file:
            file.writelines(orjson.dumps(record) + b"\n" for record in records)


def bare_loop(source: Path, split: str) -> int:
    """Parse every line and keep nothing."""
    count = 0
    with (source / split / "conversations.json").open("rb") as file:
        for line in file:
            orjson.loads(line)
            count += 1
    return count


def read(source: Path, split: str) -> int:
    """Read every instance and keep none."""
    from d2i.corpora import read_instances

    return sum(1 for _ in read_instances("mmdialog", source, split))


def plan(source: Path, limit: int | None) -> int:
    """Plan the training split as Parquet files."""
    from d2i.preprocess.plan.planner import PlanRequest, make_plan
    from d2i.recipes import load_recipe

    request = PlanRequest("mmdialog", str(source), "train", load_recipe("uvit-s-mmdialog"), limit)
    with tempfile.TemporaryDirectory(dir=source) as out:
        return make_plan(request, out).num_instances


WORK: dict[str, Callable[[Path], int]] = {
    "bare loop, train": lambda source: bare_loop(source, "train"),
    "read, train": lambda source: read(source, "train"),
    "plan of 1,000,000, train": lambda source: plan(source, NUM_PLANNED),
    "plan of all, train": lambda source: plan(source, None),
    "bare loop, valid": lambda source: bare_loop(source, "valid"),
    "read, valid": lambda source: read(source, "valid"),
}


def measure(name: str, source: Path) -> dict[str, float]:
    """Run one task in this process."""
    import d2i.preprocess.plan.planner  # noqa: F401  # Imports are not timed.

    start = time.perf_counter()
    count = WORK[name](source)
    seconds = time.perf_counter() - start
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"count": count, "seconds": seconds, "peak_mb": peak_kib * 1024 / 1e6}


def repeats(source: Path, num_repeats: int) -> Iterator[dict[str, dict[str, float]]]:
    """Measure all tasks alternately, each in a separate process."""
    for number in range(num_repeats):
        found = {}
        for name in WORK:
            command = [sys.executable, __file__, "--measure", name, "--source", str(source)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[name] = json.loads(done.stdout)
            print(f"repeat {number + 1}: {name}: {done.stdout.strip()}", file=sys.stderr)
        yield found


def summary(runs: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Summarize the repeats of each task."""
    summed = {}
    for name in WORK:
        bare = f"bare loop, {name.rpartition(' ')[2]}"
        ratios = [run[name]["seconds"] / run[bare]["seconds"] for run in runs]
        summed[name] = {
            "count": runs[0][name]["count"],
            "seconds": round(statistics.median(run[name]["seconds"] for run in runs), 2),
            "ratio": round(statistics.median(ratios), 2),
            "all_ratios": [round(ratio, 2) for ratio in ratios],
            "peak_mb": round(max(run[name]["peak_mb"] for run in runs)),
        }
    return summed


def machine() -> dict[str, object]:
    """Describe the machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"processor": names[0] if names else platform.machine(), "cores": len(names)}


def main() -> None:
    """Write the corpus, measure, and print one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num-train", type=int, default=NUM_TRAIN)
    parser.add_argument("--num-valid", type=int, default=NUM_VALID)
    parser.add_argument("--measure", choices=WORK, help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.source)))
        return
    with tempfile.TemporaryDirectory() as directory:
        make_corpus(Path(directory), options.num_train, options.num_valid)
        runs = list(repeats(Path(directory), options.repeats))
    print(json.dumps({"machine": machine(), "python": platform.python_version(), **summary(runs)}))


if __name__ == "__main__":
    main()
