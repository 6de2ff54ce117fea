"""The model card of a run that fine-tuned the network of a pipeline, as hubs show it."""

from __future__ import annotations

from d2i import __version__
from d2i.backbones import presets_of
from d2i.config import Recipe
from d2i.corpora.registry import CORPORA
from d2i.dialog import Turn
from d2i.errors import D2IError
from d2i.io import storage
from d2i.io.config_lock import read_settings
from d2i.models.pipeline_dir import PipelineDirectory
from d2i.prompt_text import context_text

CARD_NAME = "README.md"
_EXAMPLE = (Turn(0, "look what i saw"), Turn(1, "what?"), Turn(0, "a big red ball on the beach"))


def write_model_card(run_url: str, recipe: Recipe, data_url: str, base_sha256: str) -> None:
    """Write the card of a finished run: base model, data and their terms, and how to prompt it.

    Args:
        run_url: The run.
        recipe: Its recipe.
        data_url: The data set that it was trained on.
        base_sha256: Of the base model's network.
    """
    presets = presets_of(recipe.backbone.name)
    base = PipelineDirectory(recipe.backbone.weights or "", presets).name
    adapter, text, config = recipe.adapter, recipe.text, recipe.train
    side = "most recent" if text.keep == "end" else "first"
    is_lora = adapter.kind is not None
    trained = f"a LoRA of rank {adapter.rank}" if is_lora else f"its whole {presets.network_part}"
    load = (
        f'pipeline = {presets.pipeline}.from_pretrained("{base}")\n'
        'pipeline.load_lora_weights("RUN/adapter")'
        if is_lora
        else f"{presets.network_part} = {presets.network}.from_pretrained("
        f'"RUN/{presets.network_part}")\n'
        f"pipeline = {presets.pipeline}.from_pretrained("
        f'"{base}", {presets.network_part}={presets.network_part})'
    )
    classes = presets.pipeline if is_lora else f"{presets.pipeline}, {presets.network}"
    example = context_text(_EXAMPLE, text)
    prompt = example.replace('"', '\\"')
    lines = [
        "---",
        f"base_model: {base}",
        "library_name: diffusers",
        f"tags: [dialog-to-image, text-to-image{', lora' if is_lora else ''}]",
        "---",
        f"# {recipe.name}",
        "",
        f"{base}, {trained} fine-tuned on dialogs by d2i {__version__}: it takes a conversation",
        "and generates the image that answers it.",
        "",
        f"- **Base model**: {base} ({presets.pipeline}); its {presets.network_part} has the sha256",
        f"  {base_sha256}. Its licence holds for what was trained, too.",
        f"- **Data**: {_describe_data(data_url)}",
        f"- **Training**: {config.num_steps} steps of {config.global_batch_size} samples at "
        f"{recipe.image.resolution} px, learning rate {config.optim.lr:g}.",
        "",
        "## How to prompt it",
        "",
        f"With the whole conversation on one line, linearized as `{text.strategy}`; of one that is",
        f"too long, the {side} turns. For example:",
        "",
        "```text",
        example,
        "```",
        "",
        "```python",
        f"from diffusers import {classes}",
        "",
        load,
        f'image = pipeline("{prompt}").images[0]',
        "```",
        "",
        "`d2i sample --run RUN --dialog FILE` does both steps for a dialog in a file.",
    ]
    storage.write_bytes(storage.join(run_url, CARD_NAME), ("\n".join(lines) + "\n").encode())


def _describe_data(data_url: str) -> str:
    """Name the corpus of a data set and its terms, if its plan is there."""
    try:
        plan = read_settings(storage.join(data_url, "plan", "plan.json"))
        if named := plan.get("corpus_name"):
            return f"{named}."
        # A plan may come from a stranger, so a class that it names is not imported.
        corpus = CORPORA[plan["decided_by"]["corpus"]]
    except (OSError, D2IError, KeyError, TypeError):
        return "not known: there is no plan of a known corpus beside it."
    return f"{corpus.title}. {corpus.licence}"
