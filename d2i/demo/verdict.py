"""The judge's verdict on evaluations: `judged.json` beside `scores.json`.

Counts, by rule, how many attributes of the conversation's scene are in the generated picture;
beside it the same for the true pictures, for what the codec makes of them, and for chance.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from d2i.demo.judge import Answer, read_all
from d2i.demo.scene import ATTRIBUTES, Scene
from d2i.recipes import read_kept_recipe
from d2i.shards import ShardReader

_JUDGE = (
    "Six attributes read from the pixels by rule: palette of sky and ground, and the silhouette "
    "that explains most of what the background does not. Nothing in it is learned."
)


def judge_evaluations(folders: Sequence[Path], data: Path, corpus: Path) -> str:
    """Judge every evaluation of one data set and write its `judged.json`.

    Args:
        folders: Evaluations with all their pictures kept.
        data: Folder of the test shards.
        corpus: The made corpus, for the truth.

    Returns:
        One line: the accuracies.
    """
    reader = ShardReader(str(data))
    scenes = _scenes(reader, corpus)
    baselines = {
        "true": _answers(_true_pictures(reader)),
        "codec": _answers(_reconstructions(reader)),
    }
    line = []
    for folder in folders:
        answers = _answers(_generated(folder))
        verdict = _verdict(scenes, answers, baselines)
        (folder / "judged.json").write_text(json.dumps(verdict, indent=1) + "\n")
        line.append(f"{folder.name} {verdict['accuracy']['generated']:.1%}")
    return ", ".join(line)


Answers = dict[str, Answer]


def _verdict(
    scenes: dict[str, Scene], answers: Answers, baselines: dict[str, Answers]
) -> dict[str, Any]:
    keys = sorted(scenes)
    columns = {"generated": answers} | baselines
    by_attribute = {
        name: {column: _share(name, keys, scenes, given) for column, given in columns.items()}
        | {"chance": _share(name, keys, _moved(keys, scenes), baselines["true"])}
        for name in ATTRIBUTES
    }
    return {
        "judge": _JUDGE,
        "num_images": len(keys),
        "accuracy": {
            column: float(np.mean([shares[column] for shares in by_attribute.values()]))
            for column in (*columns, "chance")
        },
        "by_attribute": by_attribute,
        "examples": {
            key: {"wanted": scenes[key].attributes(), "read": answers[key]} for key in keys
        },
    }


def _share(name: str, keys: Sequence[str], scenes: dict[str, Scene], given: Answers) -> float:
    return float(np.mean([given[key][name] == getattr(scenes[key], name) for key in keys]))


def _moved(keys: Sequence[str], scenes: dict[str, Scene]) -> dict[str, Scene]:
    """Every key with the scene of another one: what a picture of no dialog in particular gets."""
    others = [*keys[len(keys) // 2 :], *keys[: len(keys) // 2]]
    return {key: scenes[other] for key, other in zip(keys, others, strict=True)}


def _scenes(reader: ShardReader, corpus: Path) -> dict[str, Scene]:
    """The scene that each test instance's true picture shows, by instance key."""
    truth = {}
    for line in (corpus / "scenes.jsonl").read_text().splitlines():
        row = json.loads(line)
        truth[row["media_key"]] = Scene(**{name: row[name] for name in ATTRIBUTES})
    samples = (reader.read_json(index) for index in range(len(reader)))
    return {s["key"]: truth[Path(s["source"]["ref"][0]).stem] for s in samples}


def _answers(pictures: dict[str, Image.Image]) -> Answers:
    return dict(zip(pictures, read_all(list(pictures.values())), strict=True))


def _generated(folder: Path) -> dict[str, Image.Image]:
    pictures: dict[str, Image.Image] = {}
    for path in sorted((folder / "images").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None:
                    pictures[member.name.removesuffix(".png")] = Image.open(io.BytesIO(file.read()))
    return pictures


def _true_pictures(reader: ShardReader) -> dict[str, Image.Image]:
    sources = ((key, reader.read_image(index)) for index, key in enumerate(reader.keys))
    return {key: Image.open(io.BytesIO(data)) for key, data in sources if data is not None}


def _reconstructions(reader: ShardReader) -> dict[str, Image.Image]:
    """What the codec alone makes of the true pictures: the stored moments' means, decoded."""
    import torch

    from d2i.encoders import Vae

    encoders = read_kept_recipe(str(Path(reader.url).parent)).encoders
    means = reader.read(range(len(reader)), members=("moments",))["moments"][:, :4]
    decoded = Vae(encoders.vae, encoders.vae_kind).decode(
        torch.from_numpy(means.astype(np.float32)), encoders.compute_batch_size
    )
    return {key: Image.fromarray(pixels) for key, pixels in zip(reader.keys, decoded, strict=True)}
