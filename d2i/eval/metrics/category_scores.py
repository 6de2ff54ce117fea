"""Scores per category: people, food and animals (the paper's Figure 5), by PhotoChat's labels.

The labels are classes of Open Images. The paper publishes no lists, so `label_words.json` is our
own: each list has the classes of one branch of the Open Images hierarchy, with the parts of a
person for people and the drinks for food. It has Open Images' newer names ("Human face", "Dairy
Product") and PhotoChat's words ("Face", "Dairy"): the older names, without "Human" except for
"Human body".

The paper scores 50 samples per category. Here FID and IS are means over several seeded draws of 50,
so that a difference can be distinguished from chance; KID and CLIP-I use all images of a category.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2i.dialog import key_order_hash
from d2i.errors import DataError
from d2i.eval.metrics.influences import divergences
from d2i.eval.metrics.intervals import bca
from d2i.eval.metrics.kid import paired_mmd
from d2i.eval.metrics.measured import Arrays, Measured
from d2i.eval.tasks import finished_tasks, read_tasks
from d2i.io import checksums, storage
from d2i.shards import ShardReader

Floats = NDArray[np.float64]

CATEGORIES_NAME = "categories.json"
"""The corpus whose labels name the content of an image."""
DRAW_SIZE = 50
NUM_DRAWS = 20
_MIN_IMAGES = 2


@dataclass(frozen=True)
class CategoryScores:
    """Scores of one evaluation within one category.

    Args:
        name: `people`, `food` or `animals`.
        num_instances: Instances of the data set that have one of the category's labels.
        num_pictures: Those with a generated image; only they are scored.
        num_draws: Random draws that FID and IS are averaged over; 1 where all images fit in one.
        draw_size: Images in each draw.
        keys: Up to `DRAW_SIZE` keys: the first draw from all instances of the category.
        fid: Mean FID of the draws; None, like all scores, for fewer than two images.
        fid_std: Its population standard deviation over the draws; None for a single draw.
        is_: Mean Inception Score of the draws, each in one split; None without class logits.
        is_std: Its population standard deviation over the draws.
        kid_paired: KID of all images, without the bias of pairs from the same dialog.
        clip_i: Mean CLIP-I of all images, 0 to 100.
        clip_i_interval: 95 % confidence interval of it, [low, high]; None if all are equal.
    """

    name: str
    num_instances: int
    num_pictures: int
    num_draws: int
    draw_size: int
    keys: list[str]
    fid: float | None = None
    fid_std: float | None = None
    is_: float | None = None
    is_std: float | None = None
    kid_paired: float | None = None
    clip_i: float | None = None
    clip_i_interval: list[float] | None = None


@cache
def read_label_words() -> dict[str, frozenset[str]]:
    """Return the labels of each category."""
    content = files("d2i.eval").joinpath("label_words.json").read_text(encoding="utf-8")
    return {name: frozenset(words) for name, words in json.loads(content).items()}


def write_categories(out_url: str, reader: ShardReader, arrays: Arrays | None = None) -> None:
    """Score the categories of a finished evaluation and write its `categories.json`.

    Args:
        out_url: The evaluation's directory.
        reader: The data set that was evaluated.
        arrays: The arrays of its tasks; None reads them.

    Raises:
        DataError: If the tasks are missing or damaged, or belong to another data set.
        ShardError: If the data set cannot be read.
    """
    if arrays is None:
        arrays = read_tasks(out_url, finished_tasks(out_url))
    if "keys" not in arrays or arrays["keys"].tolist() != list(reader.keys):
        raise DataError(
            f"{out_url}/tasks: got measurements of {len(arrays.get('keys', ()))} instances; "
            f"expected those of the {len(reader)} instances of {reader.url}, in order; run "
            "`d2i eval` again"
        )
    members = find_members(reader)
    document = {
        "num_instances": len(reader),
        "num_in_two": num_shared(members),
        "num_draws": NUM_DRAWS,
        "draw_size": DRAW_SIZE,
        "categories": [_as_json(found) for found in score_categories(Measured(arrays), members)],
    }
    data = json.dumps(document, indent=1, sort_keys=True) + "\n"
    checksums.write_bytes(storage.join(out_url, CATEGORIES_NAME), data.encode())


def find_members(reader: ShardReader) -> dict[str, list[str]]:
    """Return the keys of each category's instances, in the order of the data set.

    An instance is in every category that it has a label of.

    Raises:
        ShardError: If the data set cannot be read.
    """
    members: dict[str, list[str]] = {name: [] for name in read_label_words()}
    for place, key in enumerate(reader.keys):
        labels = frozenset(reader.read_json(place).get("labels") or ())
        for name, words in read_label_words().items():
            if labels & words:
                members[name].append(key)
    return members


def num_shared(members: Mapping[str, Sequence[str]]) -> int:
    """Count the instances that are in two categories or more."""
    times = Counter(key for keys in members.values() for key in keys)
    return sum(number > 1 for number in times.values())


def score_categories(
    measured: Measured, members: Mapping[str, Sequence[str]]
) -> list[CategoryScores]:
    """Score each category that has instances."""
    places = {key: place for place, key in enumerate(measured.arrays["keys"].tolist())}
    row_of = {place: row for row, place in enumerate(measured.generated.tolist())}
    found = []
    for name, keys in members.items():
        generated = [key for key in keys if places[key] in row_of]
        if keys:
            rows = np.array([row_of[places[key]] for key in generated], dtype=np.int64)
            found.append(_score(name, keys, generated, rows, measured))
    return found


def choose_keys(keys: Sequence[str], seed: int) -> list[str]:
    """Draw `DRAW_SIZE` keys without replacement, or all: the first in the order of a seeded hash.

    Two systems with images for the same instances get the same keys, whatever their order.
    """
    return sorted(keys, key=lambda key: key_order_hash(key, seed))[:DRAW_SIZE]


def fid_of_few(real: Floats, fake: Floats) -> float:
    """Return the exact FID of fewer images than features, fast.

    For covariances A'A and B'B, the trace of the square root of their product is the nuclear norm
    of A B', which has a row per reference image and a column per generated image.

    Args:
        real: (N, D) features of the reference images.
        fake: (M, D) features of the generated images.
    """
    means = real.mean(axis=0), fake.mean(axis=0)
    a = (real - means[0]) / np.sqrt(len(real) - 1)
    b = (fake - means[1]) / np.sqrt(len(fake) - 1)
    between = ((means[0] - means[1]) ** 2).sum()
    of_root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(between + (a**2).sum() + (b**2).sum() - 2 * of_root)


def inception_score(logits: Floats) -> float:
    """Return the Inception Score (Salimans et al. 2016, section 4) of logits (M, C): one split."""
    return float(np.exp(divergences(logits).mean()))


def _score(
    name: str,
    keys: Sequence[str],
    generated: Sequence[str],
    rows: NDArray[np.int64],
    measured: Measured,
) -> CategoryScores:
    """Score one category: `generated` are its keys with a generated image, `rows` their rows."""
    num_draws = NUM_DRAWS if len(generated) > DRAW_SIZE else 1
    size = min(DRAW_SIZE, len(generated))
    counted = (name, len(keys), len(generated), num_draws, size, choose_keys(keys, 0))
    if len(generated) < _MIN_IMAGES:
        return CategoryScores(*counted)
    arrays = measured.arrays
    real = arrays["real_features"][measured.generated[rows]].astype(np.float64)
    fake = arrays["features"][rows].astype(np.float64)
    logits = arrays["logits"][rows].astype(np.float64) if "logits" in arrays else None
    place = {key: at for at, key in enumerate(generated)}
    draws = [[place[key] for key in choose_keys(generated, seed)] for seed in range(num_draws)]
    fids = [fid_of_few(real[draw], fake[draw]) for draw in draws]
    scores = [] if logits is None else [inception_score(logits[draw]) for draw in draws]
    # Rounding may carry the cosine of an image with itself past 1.
    clip_i = np.clip(measured.clip_i[rows], -100.0, 100.0)
    # PhotoChat has one instance per dialog.
    dialogs = np.arange(len(rows))
    paired, interval = paired_mmd(real, fake, dialogs), bca(clip_i, dialogs)
    return CategoryScores(
        *counted,
        fid=float(np.mean(fids)),
        fid_std=_spread(fids),
        is_=float(np.mean(scores)) if scores else None,
        is_std=_spread(scores),
        kid_paired=paired.value if paired else None,
        clip_i=float(clip_i.mean()),
        clip_i_interval=list(interval) if interval else None,
    )


def _spread(values: Sequence[float]) -> float | None:
    return float(np.std(values)) if len(values) > 1 else None


def _as_json(scores: CategoryScores) -> dict[str, Any]:
    values = asdict(scores)
    return {"is" if name == "is_" else name: value for name, value in values.items()}
