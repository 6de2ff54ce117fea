"""Attribute accuracy of evaluations, by the judge: `judged.json` beside `scores.json`.

The judge counts by rule how many attributes of the dialog's scene are in the generated image. The
same is done for the reference images, for their VAE reconstructions, and for two controls: the
generated and the reference images, each with another dialog's scene.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from d2i.demo.judge import Answer, attribute_accuracy, read_all
from d2i.demo.scene import ATTRIBUTES, GROUPS, Scene
from d2i.io import checksums
from d2i.recipes import read_stored_recipe
from d2i.report.evaluation import read_evaluation
from d2i.shards import ShardReader

_JUDGE = (
    "Six attributes read from the pixels by rule: palette of sky and ground, and the silhouette "
    "that explains most of what the background does not. Nothing in it is learned."
)


def judge_evaluations(directories: Sequence[Path], data: Path, corpus: Path) -> str:
    """Judge every evaluation of one data set and write its `judged.json`.

    Args:
        directories: Directories of evaluations that saved all images.
        data: Directory of the test shards.
        corpus: The made corpus, for the ground truth.

    Returns:
        One line with the accuracy of each evaluation.
    """
    reader = ShardReader(str(data))
    scenes = _scenes(reader, corpus)
    baselines = {
        "true": _answers(_true_images(reader)),
        "codec": _answers(_reconstructions(reader)),
    }
    line = []
    for directory in directories:
        answers = _answers(_generated(directory))
        verdict = _verdict(scenes, answers, baselines)
        content = (json.dumps(verdict, indent=1) + "\n").encode()
        checksums.write_bytes(str(directory / "judged.json"), content)
        line.append(f"{directory.name} {verdict['accuracy']['generated']:.1%}")
    return ", ".join(line)


Answers = dict[str, Answer]


def _verdict(
    scenes: dict[str, Scene], answers: Answers, baselines: dict[str, Answers]
) -> dict[str, Any]:
    keys = sorted(scenes)
    wanted = [scenes[key] for key in keys]
    # Every image with another dialog's scene: the score of images unrelated to the dialog.
    others = [*wanted[len(wanted) // 2 :], *wanted[: len(wanted) // 2]]
    read = {name: [given[key] for key in keys] for name, given in baselines.items()}
    read["generated"] = [answers[key] for key in keys]
    columns = {name: attribute_accuracy(given, wanted) for name, given in read.items()} | {
        "shuffled": attribute_accuracy(read["generated"], others),
        "chance": attribute_accuracy(read["true"], others),
    }
    return {
        "judge": _JUDGE,
        "num_images": len(keys),
        "accuracy": _means(columns, tuple(ATTRIBUTES)),
        "groups": {group: _means(columns, names) for group, names in GROUPS.items()},
        "by_attribute": {
            name: {column: shares[name] for column, shares in columns.items()}
            for name in ATTRIBUTES
        },
        "examples": {
            key: {"wanted": scenes[key].attributes(), "read": answers[key]} for key in keys
        },
    }


def _means(columns: dict[str, dict[str, float]], names: Sequence[str]) -> dict[str, float]:
    """Return the mean over some attributes, by column."""
    return {
        column: float(np.mean([shares[name] for name in names]))
        for column, shares in columns.items()
    }


def _scenes(reader: ShardReader, corpus: Path) -> dict[str, Scene]:
    """Return the scene that each test instance's reference image shows, by instance key."""
    truth = {}
    for line in (corpus / "scenes.jsonl").read_text().splitlines():
        row = json.loads(line)
        truth[row["media_key"]] = Scene(**{name: row[name] for name in ATTRIBUTES})
    samples = (reader.read_json(index) for index in range(len(reader)))
    return {s["key"]: truth[Path(s["source"]["ref"][0]).stem] for s in samples}


def _answers(images: dict[str, Image.Image]) -> Answers:
    return dict(zip(images, read_all(list(images.values())), strict=True))


def _generated(directory: Path) -> dict[str, Image.Image]:
    evaluation = read_evaluation(directory)
    images = evaluation.read_images(evaluation.image_urls)
    return {key: Image.open(io.BytesIO(data)) for key, data in images.items()}


def _true_images(reader: ShardReader) -> dict[str, Image.Image]:
    sources = ((key, reader.read_image(index)) for index, key in enumerate(reader.keys))
    return {key: Image.open(io.BytesIO(data)) for key, data in sources if data is not None}


def _reconstructions(reader: ShardReader) -> dict[str, Image.Image]:
    """Return the reference images' VAE reconstructions: the means of stored latents, decoded."""
    import torch

    from d2i.encoders import Vae

    encoders = read_stored_recipe(str(Path(reader.url).parent)).encoders
    vae = Vae(encoders.vae, encoders.vae_kind)
    name = vae.codec.array
    stored = reader.read(range(len(reader)), members=(name,))[name]
    means = vae.codec.mean(torch.from_numpy(stored.astype(np.float32)))
    decoded = vae.decode(means, encoders.compute_batch_size)
    return {key: Image.fromarray(pixels) for key, pixels in zip(reader.keys, decoded, strict=True)}
