"""Write a data set, a run and its evaluation by user commands, for backward compatibility tests.

    python tests/made_before/make.py DIR

The files beside this script were made by it, in `/data/made-before`, before the names in the code
changed. They are not regenerated: later versions of d2i must open them unchanged.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COMMAND = (sys.executable, "-c", "from d2i.cli import main; main()")
NUM_SAMPLES = {"test": 2, "train": 2}
WORDS = ("a red ball", "the green tent", "two blue boxes", "that yellow ring")
# Small enough that a run takes 100 kB.
NETWORK = {
    "backbone.weights": "scratch",
    "backbone.latent_size": 16,
    "backbone.patch_size": 4,
    "backbone.text_dim": 64,
    "backbone.dim": 4,
    "backbone.depth": 3,
    "backbone.num_heads": 1,
    "train.num_steps": 2,
    "train.global_batch_size": 2,
    "train.micro_batch_size": 2,
    "train.num_checkpoint_steps": 2,
    "train.num_log_steps": 1,
    "train.num_validation_steps": 100,
}
SAMPLING = {"sample.num_steps": 2, "sample.compute_batch_size": 4}


def settings(values: Mapping[str, object]) -> list[str]:
    """Return `--set NAME=VALUE` for each."""
    return [part for name, value in values.items() for part in ("--set", f"{name}={value}")]


def commands() -> dict[str, list[str]]:
    """Return the command lines by name, in order; run in the directory that holds `chats`."""
    recipe = ["--recipe", "demo"]
    chats = ["--corpus", "jsonl", "--source", "chats"]
    data, run = ["--data", "data"], ["--run", "run"]
    evaluated = ["--system", "run:run", *data, "--out", "evaluation", "--save-images", "all"]
    return {
        "corpus": ["corpus", *chats],
        "preprocess": ["preprocess", *chats, *recipe, "--out", "data", "--workers", "0"],
        "train": ["train", *recipe, *data, *run, "--num-accelerators", "1", *settings(NETWORK)],
        "eval": ["eval", *evaluated, *settings(SAMPLING)],
        "verify": ["verify", "data/test"],
    }


def write_chats(directory: Path) -> None:
    """Write one dialog per image; the image of one test dialog is missing."""
    directory.mkdir()
    y, x = np.mgrid[0:32, 0:32] * 8
    for number, (split, count) in enumerate(NUM_SAMPLES.items()):
        lines = []
        for index in range(count + (split == "test")):
            name = f"{split}{index}.jpg"
            if index < count:
                pixels = np.stack([x, y, np.full_like(x, 60 * index + 30 * number)], -1)
                Image.fromarray(pixels.astype(np.uint8)).save(directory / name, quality=80)
            said = f"look at {WORDS[index % len(WORDS)]}"
            turns = [{"speaker": "ann", "text": said}, {"speaker": "bob", "images": [name]}]
            lines.append(json.dumps({"id": f"{split}{index}", "turns": turns}))
        (directory / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def run_all(directory: Path) -> dict[str, Any]:
    """Create `directory` and run every command in it; return the JSON that each prints, by name."""
    directory.mkdir(parents=True, exist_ok=True)
    write_chats(directory / "chats")
    printed = {}
    for name, words in commands().items():
        line = [*COMMAND, *words, "--json"]
        done = subprocess.run(line, cwd=directory, stdout=subprocess.PIPE, check=True)
        printed[name] = json.loads(done.stdout.splitlines()[-1])
    return printed


def main(directory: Path) -> None:
    """Run all commands and delete the files that are not stored."""
    run_all(directory)
    # TensorBoard's file name contains the host name; loss.png only plots metrics.jsonl.
    shutil.rmtree(directory / "run" / "tensorboard")
    (directory / "run" / "loss.png").unlink()


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(f"usage: {sys.argv[0]} DIR")
    main(Path(sys.argv[1]))
