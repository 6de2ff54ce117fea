"""The weights that a training leaves, in the form that other programs read."""

from __future__ import annotations

import json

from d2i.backbones import presets_of
from d2i.config import Recipe, WeightsKind
from d2i.io import storage
from d2i.models import save_weights
from d2i.models.lora import pack_lora
from d2i.models.pipeline_dir import PipelineDirectory
from d2i.train.checkpoint.checkpoint_files import KIND_OF_WEIGHTS, Checkpoint


def save_trained(recipe: Recipe, checkpoint: Checkpoint, kind: WeightsKind, url: str) -> None:
    """Write one kind of a checkpoint's weights as safetensors, with their sha256 beside them.

    The file's metadata has the `step`, and for a base model that was fine-tuned within its pipeline
    `base_sha256`.

    Args:
        recipe: Of the run.
        checkpoint: With the weights.
        kind: Which of them.
        url: The file, as `d2i.run_dir.result_names` names it.
    """
    state = dict(checkpoint.read_whole(KIND_OF_WEIGHTS[kind]))
    described = {"step": str(checkpoint.progress.step)}
    if checkpoint.base_sha256:
        described["base_sha256"] = checkpoint.base_sha256
    presets = presets_of(recipe.backbone.name)
    if recipe.adapter.kind:
        state, metadata = pack_lora(state, recipe.adapter, presets)
        described |= metadata
    save_weights(state, url, described)


def save_network_config(recipe: Recipe, url: str) -> None:
    """Write the `config.json` of a pipeline's network beside its trained weights, if it has one."""
    presets, weights = presets_of(recipe.backbone.name), recipe.backbone.weights
    if recipe.adapter.kind or presets.pipeline is None or weights is None:
        return
    base = PipelineDirectory(weights, presets)
    data = storage.read_bytes(str(base.path / presets.network_part / "config.json"))
    config, side = json.loads(data), recipe.backbone.latent_size
    if "sample_size" in config and side not in (None, config["sample_size"]):
        # The side that a stock pipeline generates by default.
        data = (json.dumps(config | {"sample_size": side}, indent=2) + "\n").encode()
    storage.write_bytes(storage.join(url.rpartition("/")[0], "config.json"), data)
