"""The plan: which instances there are, and which shard each goes into.

The plan is a function of the corpus, the recipe, `--limit` and `--seed` alone. It is written
beside the shards before anything is fetched, so that a repeated command does the same work.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from d2i import storage
from d2i.config import Recipe
from d2i.corpora import Problem, read_instances
from d2i.dialog import ImageRef, Instance, key_order_hash
from d2i.errors import ConfigError, DataError
from d2i.preprocess.records import write_records
from d2i.settle import differences
from d2i.shards import read_commits

_FORMAT = 1


@dataclass(frozen=True)
class PlanRequest:
    """What decides a plan."""

    corpus: str
    source: str
    split: str
    recipe: Recipe
    limit: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Plan:
    """The plan of one split, as kept in `plan/plan.json`."""

    decided_by: dict[str, Any]
    num_instances: int
    num_images: int
    num_shards: int
    problems: dict[str, int]
    format: int = _FORMAT


def make_plan(request: PlanRequest, split_url: str, *, keep: bool = True) -> Plan:
    """Return the plan at `split_url`, made now if it is not there yet.

    A plan of other settings, of which no shard was finished, is made anew.

    Args:
        request: What decides the plan.
        split_url: The data set's folder.
        keep: Whether a new plan is written there, with the records of its shards.

    Raises:
        ConfigError: If finished shards are there that other settings decided; the difference is
            named.
        DataError: If the corpus holds no instance of this split.
    """
    there = _read_plan(split_url)
    if there is not None:
        named = differences(_decided_by(request), there.decided_by)
        if not named:
            return there
        if read_commits(split_url):
            raise ConfigError(
                f"{split_url} was begun with other settings: got {'; '.join(named[:3])}; "
                "repeat those or choose another --out"
            )
    problems: list[Problem] = []
    instances = _select(_read(request, problems), request.limit, request.seed)
    shards = list(_shards(instances, request.recipe.preprocess.num_samples_per_shard))
    plan = Plan(
        decided_by=_decided_by(request),
        num_instances=len(instances),
        num_images=len({_image_hash(instance.image_ref) for instance in instances}),
        num_shards=len(shards),
        problems=dict(sorted(Counter(problem.reason for problem in problems).items())),
    )
    if keep:
        _write_plan(split_url, plan, shards, problems)
    return plan


def _read_plan(split_url: str) -> Plan | None:
    url = _plan_url(split_url)
    return Plan(**json.loads(storage.read_bytes(url))) if storage.exists(url) else None


def _write_plan(
    split_url: str, plan: Plan, shards: list[list[Instance]], problems: list[Problem]
) -> None:
    """Write the records, the problems and, last, the plan, in place of what is there."""
    storage.remove(_plan_url(split_url))
    folder = storage.join(split_url, "plan")
    for name in storage.list_names(folder):
        storage.remove(storage.join(folder, name))
    for index, shard in enumerate(shards):
        write_records(records_url(split_url, index), shard)
    lines = [json.dumps(asdict(problem), sort_keys=True) for problem in problems]
    storage.write_bytes(
        storage.join(split_url, "plan", "problems.jsonl"), "\n".join(lines).encode()
    )
    data = json.dumps(asdict(plan), indent=1, sort_keys=True).encode()
    storage.write_bytes(_plan_url(split_url), data)


def _plan_url(split_url: str) -> str:
    return storage.join(split_url, "plan", "plan.json")


def records_url(split_url: str, index: int) -> str:
    """Return where the records of one planned shard lie."""
    return storage.join(split_url, "plan", f"{index:06d}.parquet")


def _read(request: PlanRequest, problems: list[Problem]) -> Iterator[Instance]:
    seen: set[str] = set()
    options = request.recipe.corpus.options()
    for instance in read_instances(
        request.corpus, request.source, request.split, on_problem=problems.append, **options
    ):
        if instance.key in seen:
            problems.append(Problem("duplicate_key", instance.key, "the first one is kept"))
            continue
        seen.add(instance.key)
        yield instance


def _select(instances: Iterable[Instance], limit: int | None, seed: int) -> list[Instance]:
    """Keep the `limit` smallest seeded key hashes: the same set for any order of reading."""
    if limit is None:
        chosen = list(instances)
    else:
        chosen = heapq.nsmallest(limit, instances, key=lambda i: key_order_hash(i.key, seed))
    if not chosen:
        raise DataError("the corpus holds no instance of this split; see 'd2i corpus'")
    return sorted(chosen, key=lambda i: (_image_hash(i.image_ref), i.key))


def _shards(instances: list[Instance], num_samples: int) -> Iterator[list[Instance]]:
    """Cut into shards; all instances of one picture stay together."""
    shard: list[Instance] = []
    for instance in instances:
        if len(shard) >= num_samples and instance.image_ref != shard[-1].image_ref:
            yield shard
            shard = []
        shard.append(instance)
    yield shard


def _image_hash(image_ref: ImageRef) -> str:
    return hashlib.blake2b("\n".join(image_ref.value).encode(), digest_size=8).hexdigest()


def _decided_by(request: PlanRequest) -> dict[str, Any]:
    recipe = request.recipe.model_dump(mode="json")
    settings = {name: recipe[name] for name in ("corpus", "image", "text", "encoders")}
    settings["preprocess"] = {
        name: recipe["preprocess"][name] for name in ("num_samples_per_shard", "keep_images")
    }
    return {
        "corpus": request.corpus,
        "source": storage.resolve(request.source),
        "split": request.split,
        "limit": request.limit,
        "seed": request.seed,
        "recipe": settings,
    }
