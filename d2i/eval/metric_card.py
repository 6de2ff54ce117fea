"""The metric card: everything that the scores depend on, so that they can be compared.

It records the provenance of the test data and of a run, as far as their files do, which decides
whether a table may call a system by the paper's name. Files of earlier versions record less;
missing facts are left out.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any

from d2i.config import BackboneConfig
from d2i.corpora import CORPORA
from d2i.errors import DataError
from d2i.eval.metrics.measured import Measured
from d2i.eval.worker import describe_url
from d2i.images.decode import RESIZE
from d2i.io import storage
from d2i.io.config_lock import read_settings
from d2i.models import changed_sizes
from d2i.models.model_dir import resolve_sizes
from d2i.models.weights.initial import describe_initial_weights
from d2i.run_dir import CONFIG_NAME, read_recipe
from d2i.shards import ShardReader, data_set_url

if TYPE_CHECKING:
    from d2i.eval.request import EvalRequest
    from d2i.eval.system import SystemSpec

# Options that decide the instances, and the context of each.
_OPTIONS = ("direction", "own_turn", "images_in_turn", "repeated", "earlier_images", "emoji")


def metric_card(request: EvalRequest, reader: ShardReader, measured: Measured) -> dict[str, Any]:
    """Return the card of a finished evaluation, as JSON values."""
    of_workers = read_settings(describe_url(request.out_url))
    of_workers.pop("real")
    if windows := of_workers["weights"].pop("text_tokens", None):
        of_workers["text_tokens"] = windows
    return of_workers | _system(request) | _data(request, reader, measured)


def _system(request: EvalRequest) -> dict[str, Any]:
    spec, sample = request.system, request.recipe.sample
    card = {
        "system": spec.name,
        "label": spec.label,
        "kind": spec.kind,
        "backbone": spec.network.name if spec.network else None,
        "run": spec.run_dir,
        "context": request.context,
        "text": request.recipe.text.model_dump(mode="json", exclude={"encode"}),
        "seed": sample.seed,
        "compute_batch_size": sample.compute_batch_size,
    }
    generator = spec.inner or spec
    if generator.kind in ("diffusers", "unclip"):
        card |= {"precision": sample.precision, "adapter": _adapter(generator)}
    if spec.network:
        card["changed_sizes"] = _changed_sizes(spec.network)
    if spec.run_dir:
        card |= describe_training(spec.run_dir)
    elif spec.network:
        card["initial_weights"] = describe_initial_weights(spec.network)
    if generator.kind == "run":
        card["weights_kind"] = sample.weights
    if generator.network is None:
        return card | _of_pipeline(request)
    return card | {
        "sampler": sample.sampler,
        "num_steps": sample.num_steps,
        "guidance_scale": sample.guidance_scale,
        "guidance_chosen_by": dict(request.guidance_chosen_by),
        "unconditional": sample.unconditional,
        "data_type": sample.data_type,
        "precision": sample.precision,
    }


def _of_pipeline(request: EvalRequest) -> dict[str, Any]:
    """Return a pipeline's arguments; if these set no guidance scale, its own default applies."""
    arguments = dict(request.recipe.sample.pipeline)
    card: dict[str, Any] = {"pipeline_arguments": arguments}
    if "guidance_scale" in arguments:
        card |= {
            "guidance_scale": arguments["guidance_scale"],
            "guidance_chosen_by": dict(request.guidance_chosen_by),
        }
    return card


def _adapter(spec: SystemSpec) -> dict[str, str] | None:
    adapter = spec.adapter
    return {"name": adapter.name, "sha256": adapter.sha256} if adapter else None


def _data(request: EvalRequest, reader: ShardReader, measured: Measured) -> dict[str, Any]:
    manifest, recipe = reader.manifest, request.recipe
    files = [source for source in measured.sources if " " in source]
    codecs = sorted({source.split()[0] for source in files})
    keys = "\n".join(sorted(measured.arrays["keys"].tolist()))
    return {
        "data": storage.resolve(request.data_url),
        **describe_data(request.data_url),
        "recipe": recipe.name,
        "manifest_sha256": manifest.sha256,
        "instances_sha256": hashlib.sha256(keys.encode()).hexdigest(),
        "expected": manifest.num_samples + sum(manifest.failures.values()),
        "found": len(measured.generated),
        "failures": dict(manifest.failures) | measured.failures,
        "negatives": "as the corpus lists them" if measured.listed else "by key hash",
        "drawn_at": recipe.image.resolution,
        "resolution": recipe.metrics.resolution or recipe.image.resolution,
        "resize": RESIZE,
        "codec": f"{', '.join(codecs)} files"
        if codecs
        else "none: pictures stay in memory from sampler to metric",
        "picture_sizes": sorted({source.split()[1] for source in files})[:10],
    }


def _changed_sizes(network: BackboneConfig) -> dict[str, Any]:
    """Return the sizes of a network that differ from the published, each as [its, published]."""
    changed = changed_sizes(network.name, resolve_sizes(network).overrides())
    return {name: list(sizes) for name, sizes in changed.items()}


def describe_data(data_url: str) -> dict[str, Any]:
    """Describe the corpus, split and options that a data set was planned from.

    Returns:
        `corpus` (None where no plan names it), and with a plan `split` and `corpus_options`: those
        that differ from the corpus reader's defaults.
    """
    plan = _read_plan(data_url)
    decided = plan.get("decided_by") or {}
    layout = decided.get("corpus")
    if not layout:
        return {"corpus": None}
    options = (decided.get("recipe") or {}).get("corpus") or {}
    return {
        "corpus": str(plan.get("corpus_name") or layout),
        "split": decided.get("split"),
        "corpus_options": _changed(str(layout), options),
    }


def planned_corpus(data_url: str) -> str | None:
    """Return the corpus that a data set was prepared from, as `--corpus` named it, if known."""
    return (_read_plan(data_url).get("decided_by") or {}).get("corpus")


def describe_training(run_url: str) -> dict[str, Any]:
    """Describe the data and weights that a run was trained from.

    Returns:
        `trained_text`, the text settings that it was trained with; `trained_corpus`, None where
        its data are missing or have no plan; `trained_adapter`, the settings of its adapter if it
        trained one; and `initial_weights`, where the run records them.
    """
    config = _read_object(storage.join(run_url, CONFIG_NAME))
    data = config.get("data")
    # The run may come from a stranger: contact no host for something only the card needs.
    is_here = isinstance(data, str) and not storage.names_host(data)
    corpus = describe_data(data_set_url(data, "train"))["corpus"] if data and is_here else None
    recipe = read_recipe(run_url)
    known: dict[str, Any] = {
        "trained_text": recipe.text.model_dump(mode="json"),
        "trained_corpus": corpus,
    }
    if recipe.adapter.kind:
        known["trained_adapter"] = recipe.adapter.model_dump(mode="json")
    if "initial_weights" in config:
        known["initial_weights"] = config["initial_weights"]
    return known


def _changed(layout: str, options: dict[str, Any]) -> dict[str, Any]:
    # A plan may come from a stranger, so a class that it names is not imported.
    kind = CORPORA.get(layout)
    defaults = {field.name: field.default for field in dataclasses.fields(kind)} if kind else {}
    return {
        name: value
        for name in _OPTIONS
        if (value := options.get(name)) is not None and value != defaults.get(name)
    }


def _read_plan(data_url: str) -> dict[str, Any]:
    return _read_object(storage.join(data_url, "plan", "plan.json"))


def _read_object(url: str) -> dict[str, Any]:
    try:
        return read_settings(url, DataError)
    except (FileNotFoundError, NotADirectoryError):
        return {}
