"""Makes the shipped weights: `python -m d2i.demo.pretrain --out DIR`.

Part by part, codec, CLIP pair, backbone: a part whose folder is there is not made again, and the
backbone goes on from its last checkpoint, so the same command ends a broken-off run.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from d2i.demo.pretrain.clip import build_clip, load_clip, save_clip, train_clip
from d2i.demo.pretrain.codec import build_codec, save_codec, train_codec
from d2i.demo.pretrain.network import backbone_config, build_pool, save_network, train_network
from d2i.demo.pretrain.pictures import render
from d2i.demo.pretrain.texts import caption_windows, dialog_windows, join, vocabulary
from d2i.demo.scene import split_scenes

_SEED = 0
_TEXT_SEED = 1
_POOL_SEED = 100
_NUM_CODEC_STEPS = 2000
_NUM_CLIP_STEPS = 900
_NUM_NETWORK_STEPS = 1700


def main() -> None:
    """Make whatever part is missing in `--out`."""
    out, num_threads = _arguments()
    torch.set_num_threads(num_threads)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "vae").exists():
        make_codec(out)
    if not (out / "clip_image").exists():
        make_clip(out)
    if not (out / "backbone" / "config.json").exists():
        make_backbone(out)


def make_codec(out: Path) -> None:
    """Train the codec and write `vae/`."""
    torch.manual_seed(_SEED)
    codec = build_codec()
    train_codec(codec, render(3), _NUM_CODEC_STEPS, _SEED)
    save_codec(codec, out / "vae")


def make_clip(out: Path) -> None:
    """Train the CLIP pair on captions and dialogs and write `clip_text/` and `clip_image/`."""
    torch.manual_seed(_SEED)
    scenes, _ = split_scenes()
    texts = join(caption_windows(scenes * 8, _TEXT_SEED), dialog_windows(scenes * 14, _TEXT_SEED))
    pair = build_clip(vocabulary(texts))
    train_clip(pair, texts, render(3), _NUM_CLIP_STEPS, _SEED)
    save_clip(pair, out)


def make_backbone(out: Path) -> None:
    """Train the backbone on captions, conditioned on the written CLIP, and write `backbone/`."""
    # diffusers carries no types.
    autoencoder: Any = AutoencoderKL
    codec = autoencoder.from_pretrained(out / "vae", torch_dtype=torch.float32).eval()
    pool = build_pool(codec, load_clip(out), render(6), _POOL_SEED)
    config = backbone_config(codec.config.scaling_factor)
    checkpoint = out / "backbone.pt"
    weights = train_network(config, pool, _NUM_NETWORK_STEPS, _SEED, checkpoint)
    save_network(weights, config, out / "backbone")
    checkpoint.unlink()


def _arguments() -> tuple[Path, int]:
    parser = argparse.ArgumentParser(prog="python -m d2i.demo.pretrain", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the four models")
    parser.add_argument("--num-threads", type=int, default=2, help="processor cores to use")
    given = parser.parse_args()
    return given.out, given.num_threads


if __name__ == "__main__":
    main()
