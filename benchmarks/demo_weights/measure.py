"""Evaluation of the shipped models by the judge: `python -m benchmarks.demo_weights.measure`.

Prints the numbers of the model card as JSON lines: attribute accuracy of the codec, and of the
backbone on captions and, without fine-tuning, on dialogs. All on held-out scenes, with the same
classes that every stage of d2i uses.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.demo_weights.images import render_scenes
from benchmarks.demo_weights.texts import Texts, caption_windows, dialog_windows
from d2i.config import BackboneConfig
from d2i.demo.judge import attribute_accuracy, read_all
from d2i.demo.scene import GROUPS, Scene, split_scenes
from d2i.encoders import ClipText, Vae
from d2i.eval.sampler import Sampler
from d2i.recipes import load_recipe
from d2i.tokenize import encode, window
from d2i.weights_resolve import resolve_weights

_TEXT_SEED = 77
_JITTER = 10_000


def main() -> None:
    """Measure codec and backbone of a directory of models, by default the shipped one."""
    models, num_scenes = _arguments()
    torch.set_num_threads(2)
    vae = Vae(str(models / "vae"), "kl")
    scenes = (split_scenes()[1] * (num_scenes // len(split_scenes()[1]) + 1))[:num_scenes]
    _report("codec", reconstruct(vae, scenes), scenes)
    if not (models / "backbone").exists():
        return
    captions, dialogs = caption_windows(scenes, _TEXT_SEED), dialog_windows(scenes, _TEXT_SEED)
    for name, texts in (("captions", captions), ("dialogs", _first(dialogs, num_scenes))):
        _report(name, generate(models, vae, texts), texts.scenes)


def reconstruct(vae: Vae, scenes: list[Scene]) -> NDArray[np.uint8]:
    """Return the codec's reconstructions of the scenes' images: uint8 (N, 64, 64, 3)."""
    pixels = render_scenes(scenes, _JITTER).pixels_NCHW.permute(0, 2, 3, 1).numpy()
    batch_size = load_recipe("demo").encoders.compute_batch_size
    means = vae.encode(pixels, batch_size)[:, :4]
    return vae.decode(torch.from_numpy(means), batch_size)


def generate(models: Path, vae: Vae, texts: Texts) -> NDArray[np.uint8]:
    """Generate images for texts with the demo recipe's settings: uint8 (N, 64, 64, 3)."""
    recipe = load_recipe("demo")
    clip_text = ClipText(str(models / "clip_text"))
    windows = [window(encode(""))[None], texts.windows_NT.numpy().astype(np.uint16)]
    empty, text = (clip_text.encode(w, recipe.encoders.compute_batch_size) for w in windows)
    backbone = BackboneConfig(name=recipe.backbone.name, weights=str(models / "backbone"))
    keys = [f"{number:06d}" for number in range(len(texts.scenes))]
    return Sampler(backbone, vae, recipe.sample, empty[0]).generate(keys, text)


def _report(name: str, pixels: NDArray[np.uint8], scenes: list[Scene]) -> None:
    shares = attribute_accuracy(read_all([Image.fromarray(p) for p in pixels]), scenes)
    groups = {g: float(np.mean([shares[n] for n in names])) for g, names in GROUPS.items()}
    mean = float(np.mean(list(shares.values())))
    row = {"on": name, "num": len(scenes), "mean": mean} | groups | {"by_attribute": shares}
    print(json.dumps(row), flush=True)


def _first(texts: Texts, number: int) -> Texts:
    return Texts(texts.windows_NT[:number], texts.scenes[:number])


def _arguments() -> tuple[Path, int]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo_weights.measure")
    shipped = Path(resolve_weights("demo:vae")).parent
    parser.add_argument("--models", type=Path, default=shipped, help="directory of the four models")
    parser.add_argument("--num-scenes", type=int, default=222, help="held-out scenes to measure on")
    given = parser.parse_args()
    return given.models, given.num_scenes


if __name__ == "__main__":
    main()
