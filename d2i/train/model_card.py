"""The model card of a run that fine-tuned the network of a pipeline, as hubs show it.

Must not import torch: `d2i push` reads and completes the card.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from d2i import __version__
from d2i.backbones import Presets, presets_of
from d2i.config import Recipe
from d2i.corpora.registry import CORPORA
from d2i.dialog import Turn
from d2i.errors import D2IError
from d2i.io import storage
from d2i.io.config_lock import read_settings
from d2i.io.front_matter import front_matter
from d2i.io.terminal import plain
from d2i.models.licence import Licence
from d2i.prompt_text import context_messages, context_text, turn_roles

if TYPE_CHECKING:
    from d2i.models.pipeline_dir import PipelineDirectory

_MAX_CHAT_TOKENS = 512
CARD_NAME = "README.md"
TERMS = "## Terms"
"""The heading of the section about licences."""
_EXAMPLE = (Turn(0, "look what i saw"), Turn(1, "what?"), Turn(0, "a big red ball on the beach"))
# Of the run, which a repository has not.
_OF_RUN = "\n`d2i sample --run RUN --dialog FILE` does both steps for a dialog in a file.\n"


def write_model_card(
    run_url: str, recipe: Recipe, base: PipelineDirectory, data_url: str, base_sha256: str
) -> None:
    """Write the card of a finished run: base model, data and their terms, and how to prompt it.

    Args:
        run_url: The run.
        recipe: Its recipe.
        base: The base model.
        data_url: The data set that it was trained on.
        base_sha256: Of the base model's network.
    """
    presets, config, licence = presets_of(recipe.backbone.name), recipe.train, base.licence()
    name = plain(base.repository or base.name)
    is_lora = recipe.adapter.kind is not None
    trained = (
        f"a LoRA of rank {recipe.adapter.rank}" if is_lora else f"its whole {presets.network_part}"
    )
    lines = [
        f"# {plain(recipe.name)}",
        "",
        f"{name}, {trained} fine-tuned on dialogs by d2i {__version__}: it takes a conversation",
        "and generates the image that answers it.",
        "",
        f"**Training**: {config.num_steps} steps of {config.global_batch_size} samples at "
        f"{recipe.image.resolution} px, learning rate {config.optim.lr:g}.",
        "",
        TERMS,
        "",
        f"- **Base model**: {name} ({presets.pipeline}); its {presets.network_part} has the sha256 "
        f"{base_sha256}. {plain(base.describe_licence())}",
        f"- **Data**: {_describe_data(data_url)}",
        "",
        *_how_to_prompt(name, recipe, presets),
    ]
    text = _metadata(licence, base, is_lora=is_lora) + "\n".join(lines) + "\n" + _OF_RUN
    storage.write_bytes(storage.join(run_url, CARD_NAME), text.encode())


def card_of_repository(card: str, repository: str, part: str) -> str:
    """Return a run's card with its program for a repository that holds the results.

    Args:
        card: The text of the run's card, which its user may have edited.
        repository: The repository, `OWNER/NAME`.
        part: The part of a pipeline that is there as a directory, such as `unet`; `adapter` for a
            LoRA, which is at the repository's top.
    """
    place = f'"{repository}"' if part == "adapter" else f'"{repository}", subfolder="{part}"'
    return card.replace(f'"RUN/{part}"', place).replace(_OF_RUN, "")


def read_terms(card: str) -> list[str]:
    """Return the lines of a card's section about licences; none if it has no such section."""
    section = card.partition(f"\n{TERMS}\n")[2].partition("\n## ")[0]
    return section.strip().splitlines()


def _metadata(licence: Licence | None, base: PipelineDirectory, *, is_lora: bool) -> str:
    """Return the front matter; the hub accepts only a repository of its own as a base model."""
    return front_matter(
        ({"base_model": base.repository} if base.repository else {})
        | {"library_name": "diffusers"}
        | (licence.metadata() if licence else {"license": "unknown"})
        | {"tags": ["dialog-to-image", "text-to-image", *(["lora"] if is_lora else [])]}
    )


def _describe_data(data_url: str) -> str:
    """Name the corpus of a data set and its terms, if its plan is there."""
    try:
        plan = read_settings(storage.join(data_url, "plan", "plan.json"))
        if named := plan.get("corpus_name"):
            return f"{plain(str(named))}."
        # A plan may come from a stranger, so a class that it names is not imported.
        corpus = CORPORA[plan["decided_by"]["corpus"]]
    except (OSError, D2IError, KeyError, TypeError):
        return "not known: there is no plan of a known corpus beside it."
    return f"{corpus.title}. {corpus.licence}"


def _how_to_prompt(base: str, recipe: Recipe, presets: Presets) -> list[str]:
    text = recipe.text
    if text.format == "chat":
        return _how_to_prompt_chat(base, recipe, presets)
    kept = "most recent" if text.keep == "end" else "first"
    example = context_text(_EXAMPLE, text)
    is_lora = recipe.adapter.kind is not None
    classes = presets.pipeline if is_lora else f"{presets.pipeline}, {presets.network}"
    side = recipe.image.resolution
    # Flow transformers' directories do not say the size that a run was trained at.
    size = f", height={side}, width={side}" if presets.is_flow else ""
    size += "".join(f", {name}={value!r}" for name, value in presets.call_options.items())
    return [
        "## How to prompt it",
        "",
        f"With the whole conversation on one line, linearized as `{text.strategy}`; of one that is",
        f"too long, the {kept} turns. For example:",
        "",
        "```text",
        example,
        "```",
        "",
        "```python",
        *_imports(recipe, classes),
        "",
        *_loading(base, recipe, presets),
        f"image = pipeline(prompt={_quoted(example)}{size}).images[0]",
        "```",
    ]


def _how_to_prompt_chat(base: str, recipe: Recipe, presets: Presets) -> list[str]:
    text, classes = recipe.text, presets.pipeline
    if not recipe.adapter.kind:
        classes = f"{presets.pipeline}, {presets.network}"
    side = "most recent" if text.keep == "end" else "first"
    roles = turn_roles([turn.speaker for turn in _EXAMPLE], len(_EXAMPLE) - 1)
    messages = context_messages(_EXAMPLE, roles, text)
    options = {"add_generation_prompt": True, **(presets.chat or {})}
    control = (
        ["", "It was trained as a control: the roles of each chat were in a random order."]
        if text.roles == "permuted"
        else []
    )
    return [
        "## How to prompt it",
        "",
        "With the conversation as a chat: a message for each turn, in the chat template of its",
        "text encoder. The role is `assistant` for the speaker who shares the image, `user` for",
        f"all others. Of a chat over {_MAX_CHAT_TOKENS} tokens, give the {side} turns. Example:",
        *control,
        "",
        "```python",
        *_imports(recipe, classes),
        "",
        *_loading(base, recipe, presets),
        "messages = [",
        *(f'    {{"role": "{m.role}", "content": {_quoted(m.text)}}},' for m in messages),
        "]",
        "",
        "",
        "def write(message, **options):",
        "    # One by one, so that the template treats the last message like the others.",
        "    template = pipeline.tokenizer.apply_chat_template",
        "    return template([message], tokenize=False, **options)",
        "",
        "",
        "chat = [write(message) for message in messages[:-1]]",
        f"chat.append(write(messages[-1], {', '.join(f'{k}={v}' for k, v in options.items())}))",
        'empty = pipeline.encode_prompt("")[0]',
        'pipeline.tokenizer.chat_template = "{{ messages[0].content }}"  # The chat as it is.',
        'embeds = pipeline.encode_prompt("".join(chat))[0]',
        f"size = {{'height': {recipe.image.resolution}, 'width': {recipe.image.resolution}}}",
        "image = pipeline(prompt_embeds=embeds, negative_prompt_embeds=empty, **size).images[0]",
        "```",
    ]


def _imports(recipe: Recipe, classes: str | None) -> list[str]:
    torch = ["import torch"] if recipe.sample.precision == "bf16" else []
    return [*torch, f"from diffusers import {classes}"]


def _loading(base: str, recipe: Recipe, presets: Presets) -> list[str]:
    """Return the lines of Python that load the base model with what was trained."""
    dtype = ", dtype=torch.bfloat16" if recipe.sample.precision == "bf16" else ""
    if recipe.adapter.kind:
        return [
            f"pipeline = {presets.pipeline}.from_pretrained({_quoted(base)}{dtype})",
            'pipeline.load_lora_weights("RUN/adapter")',
        ]
    part = presets.network_part
    return [
        f'{part} = {presets.network}.from_pretrained("RUN/{part}"{dtype})',
        f"pipeline = {presets.pipeline}.from_pretrained({_quoted(base)}, {part}={part}{dtype})",
    ]


def _quoted(text: str) -> str:
    """Return a text as a string of Python, and of JSON."""
    return json.dumps(text, ensure_ascii=False)
