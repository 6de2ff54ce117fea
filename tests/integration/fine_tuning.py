"""Commands that fine-tune a tiny Stable Diffusion on the demo's dialogs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from d2i.demo.corpus import write_corpus
from tests.processes import run_d2i

SETTINGS = {
    "image.resolution": 64,
    "backbone.latent_size": 8,
    "encoders.clip_image": "demo:clip_image",
    "adapter.rank": 4,
    "train.num_steps": 6,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 2,
    "train.num_checkpoint_steps": 2,
    "train.num_log_steps": 2,
    "train.num_validation_steps": 3,
    "sample.num_steps": 3,
    "sample.compute_batch_size": 4,
    "metrics.extractor": "clip",
    "metrics.clip_text": "demo:clip_text",
    "metrics.resolution": 64,
}
LORA, FULL = "sd15-lora-photochat", "sd15-photochat"
ZERO = Path(__file__).parents[2] / "train"


def options(base: Path, **changed: Any) -> list[str]:
    """Return the `--set` options, with settings such as `train__seed=1` changed."""
    values = SETTINGS | {name.replace("__", "."): value for name, value in changed.items()}
    values |= {"backbone.weights": base}
    return [part for name, value in values.items() for part in ("--set", f"{name}={value}")]


def train_command(
    recipe: str,
    base: Path,
    data: Path,
    run: Path,
    num_ranks: int = 1,
    stage: int = 0,
    **changed: Any,
) -> list[object]:
    return [
        *("train", "--recipe", recipe, "--data", data, "--run", run),
        *("--num-accelerators", num_ranks, "--zero", ZERO / f"zero-{stage}.json"),
        *options(base, **changed),
    ]


def prepare(recipe: str, base: Path, place: Path, num_dialogs: int) -> Path:
    corpus, out = place / "corpus", place / "data"
    write_corpus(corpus, num_dialogs, 0)
    run_d2i(
        *("preprocess", "--corpus", "mmdialog", "--source", corpus, "--out", out),
        *("--recipe", recipe, "--workers", 0, *options(base)),
    )
    return out
