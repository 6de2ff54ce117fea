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
from d2i.shards.manifest import fingerprint_differences

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


def make_plan(request: PlanRequest, split_url: str) -> Plan:
    """Return the plan at `split_url`, made now if it is not there yet.

    Raises:
        ConfigError: If a plan is there that other settings decided; the difference is named.
        DataError: If the corpus holds no instance of this split.
    """
    plan_url = storage.join(split_url, "plan", "plan.json")
    decided_by = _decided_by(request)
    if storage.exists(plan_url):
        plan = Plan(**json.loads(storage.read_bytes(plan_url)))
        _refuse_other_settings(plan.decided_by, decided_by, split_url)
        return plan
    problems: list[Problem] = []
    instances = _select(_read(request, problems), request.limit, request.seed)
    shards = list(_shards(instances, request.recipe.preprocess.num_samples_per_shard))
    for index, shard in enumerate(shards):
        write_records(records_url(split_url, index), shard)
    plan = Plan(
        decided_by=decided_by,
        num_instances=len(instances),
        num_images=len({_image_hash(instance.image_ref) for instance in instances}),
        num_shards=len(shards),
        problems=dict(sorted(Counter(problem.reason for problem in problems).items())),
    )
    lines = [json.dumps(asdict(problem), sort_keys=True) for problem in problems]
    storage.write_bytes(
        storage.join(split_url, "plan", "problems.jsonl"), "\n".join(lines).encode()
    )
    storage.write_bytes(plan_url, json.dumps(asdict(plan), indent=1, sort_keys=True).encode())
    return plan


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


def _refuse_other_settings(there: dict[str, Any], wanted: dict[str, Any], url: str) -> None:
    differences = fingerprint_differences(wanted, there)
    if differences:
        raise ConfigError(
            f"{url} was begun with other settings: got {'; '.join(differences[:3])}; "
            "repeat those or choose another --out"
        )
