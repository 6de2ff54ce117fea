"""Train the demo's weights: `python -m benchmarks.demo_weights.train --out DIR`.

Trains the codec, the CLIP pair, the backbone, and the text tower on dialogs, in this order. A part
whose directory exists is skipped, and the backbone resumes from its last checkpoint, so the same
command resumes an interrupted run.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from benchmarks.demo_weights.clip import build_clip, load_clip, save_image, save_text, train_clip
from benchmarks.demo_weights.images import render
from benchmarks.demo_weights.network import backbone_config, build_pool, save_network, train_network
from benchmarks.demo_weights.text_encoder import train_on_dialogs
from benchmarks.demo_weights.texts import Texts, caption_windows, dialog_windows, join, vocabulary
from benchmarks.demo_weights.vae import build_codec, save_codec, train_codec
from d2i.demo.scene import split_scenes

_SEED = 0
_TEXT_SEED = 1
_READING_SEED = 2
_POOL_SEED = 100
_NUM_CODEC_STEPS = 2000
_NUM_CLIP_STEPS = 900
_NUM_READING_STEPS = 600
# The text tower trained on captions only, which the backbone is trained with.
_CAPTIONS_TOWER = "clip_captions"


def main() -> None:
    """Train every part that is missing in `--out`."""
    out, num_threads = _arguments()
    torch.set_num_threads(num_threads)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "vae").exists():
        make_codec(out)
    if not (out / "clip_image").exists():
        make_clip(out)
    if not (out / "backbone" / "config.json").exists():
        make_backbone(out)
    if not (out / "clip_text").exists():
        make_text(out)


def make_codec(out: Path) -> None:
    """Train the codec and write `vae/`."""
    torch.manual_seed(_SEED)
    codec = build_codec()
    train_codec(codec, render(3), _NUM_CODEC_STEPS, _SEED)
    save_codec(codec, out / "vae")


def clip_captions() -> Texts:
    """Return the text tower's captions: 16 of every scene that is open to training."""
    return caption_windows(split_scenes()[0] * 16, _TEXT_SEED)


def make_clip(out: Path) -> None:
    """Train the CLIP pair on captions and write `clip_captions/` and `clip_image/`.

    Its vocabulary includes the words of dialogs, which are not trained yet.
    """
    torch.manual_seed(_SEED)
    texts = clip_captions()
    words = join(texts, dialog_windows(split_scenes()[0], _TEXT_SEED))
    pair = build_clip(vocabulary(words))
    train_clip(pair, texts, render(3), _NUM_CLIP_STEPS, _SEED)
    save_text(pair, out / _CAPTIONS_TOWER)
    save_image(pair, out / "clip_image")


def make_backbone(out: Path) -> None:
    """Train the backbone on captions, conditioned on the saved CLIP, and write `backbone/`."""
    # diffusers has no type annotations.
    autoencoder: Any = AutoencoderKL
    codec = autoencoder.from_pretrained(out / "vae", torch_dtype=torch.float32).eval()
    clip = load_clip(out / _CAPTIONS_TOWER, out / "clip_image")
    pool = build_pool(codec, clip, render(6), _POOL_SEED)
    config = backbone_config(codec.config.scaling_factor)
    checkpoints = out / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    save_network(train_network(config, pool, _SEED, checkpoints), config, out / "backbone")
    shutil.rmtree(checkpoints)


def make_text(out: Path) -> None:
    """Train the text tower on dialogs about scenes open to training, and write `clip_text/`."""
    torch.manual_seed(_SEED)
    pair = load_clip(out / _CAPTIONS_TOWER, out / "clip_image")
    scenes, _ = split_scenes()
    captions = caption_windows(scenes * 4, _TEXT_SEED)
    train_on_dialogs(pair, captions, reading_dialogs(), _NUM_READING_STEPS)
    save_text(pair, out / "clip_text")


def reading_dialogs() -> Texts:
    """Return the text tower's dialogs: 14 about every scene that is open to training."""
    return dialog_windows(split_scenes()[0] * 14, _READING_SEED)


def _arguments() -> tuple[Path, int]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo_weights.train", description=__doc__
    )
    parser.add_argument("--out", type=Path, required=True, help="directory for the four models")
    parser.add_argument("--num-threads", type=int, default=2, help="CPU cores to use")
    given = parser.parse_args()
    return given.out, given.num_threads


if __name__ == "__main__":
    main()
