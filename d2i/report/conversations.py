"""A dozen conversations as chat bubbles beside the reference image and the generated ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from d2i.errors import DataError
from d2i.report.data_split import Conversation, read_conversations
from d2i.report.evaluation import Evaluation, column_names
from d2i.report.html import OmittedSection, Section, image_tag, text

NUM_CONVERSATIONS = 12
_TITLE = "Conversations"


def conversations_section(
    evaluations: Sequence[Evaluation], cases: Sequence[str] = ()
) -> Section | OmittedSection:
    """Show conversations with the images of all systems, as in the paper's Tables 4, 6 and 7.

    Evaluations on different instances are shown separately.

    Args:
        evaluations: The systems.
        cases: The keys to show, in this order. If empty, the first keys, in their seeded order,
            that every system kept an image of.

    Raises:
        DataError: If a case is in no data set, or no system kept its image.
    """
    groups = group_by_instances(evaluations)
    if cases:
        return Section("conversations", _TITLE, _cases(groups, cases))
    parts = [_part(group) for group in groups]
    bodies = [part for part in parts if not isinstance(part, OmittedSection)]
    if not bodies:
        return next(part for part in parts if isinstance(part, OmittedSection))
    return Section("conversations", _TITLE, "".join(bodies))


def render_rows(shown: Sequence[Conversation], evaluations: Sequence[Evaluation]) -> str:
    """Render conversations, each with its reference image and the images that systems kept.

    Raises:
        DataError: If a system's images cannot be read.
    """
    wanted = [conversation.key for conversation in shown]
    generated = [
        evaluation.read_images([key for key in wanted if key in evaluation.image_urls])
        for evaluation in evaluations
    ]
    return "".join(_row(conversation, evaluations, generated) for conversation in shown)


def group_by_instances(evaluations: Sequence[Evaluation]) -> list[list[Evaluation]]:
    """Group evaluations on the same conversations, in order of appearance."""
    groups: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations:
        card = evaluation.card
        identity = card.get("instances_sha256") or card.get("manifest_sha256")
        groups.setdefault(str(identity), []).append(evaluation)
    return list(groups.values())


def _cases(groups: Sequence[Sequence[Evaluation]], cases: Sequence[str]) -> str:
    wanted, bodies = list(dict.fromkeys(cases)), []
    unknown = set(wanted)
    for group in groups:
        found = {c.key: c for c in read_conversations(_data_url(group), wanted, len(wanted))}
        shown = [found[key] for key in wanted if key in found]
        unknown -= found.keys()
        for conversation in shown:
            if not any(conversation.key in e.image_urls for e in group):
                raise DataError(
                    f"--case {conversation.key}: no evaluation saved its image; expected at least "
                    "one; evaluate into a new --out with --save-images all"
                )
        bodies.append(render_rows(shown, group))
    if unknown:
        key = next(key for key in wanted if key in unknown)
        example = read_conversations(_data_url(groups[0]), groups[0][0].image_urls, 1)
        such = f", such as {example[0].key}" if example else ""
        raise DataError(
            f"--case {key}: no instance of {_data_url(groups[0])} has this key; expected a key "
            f"from instances.jsonl{such}"
        )
    return "".join(bodies)


def _data_url(evaluations: Sequence[Evaluation]) -> str:
    return str(evaluations[0].card.get("data", ""))


def _part(evaluations: Sequence[Evaluation]) -> str | OmittedSection:
    keys = set(evaluations[0].image_urls).intersection(*(e.image_urls for e in evaluations))
    if not keys:
        return OmittedSection(_TITLE, "the evaluations saved no images of the same conversation")
    data_url = _data_url(evaluations)
    try:
        shown = read_conversations(data_url, keys, NUM_CONVERSATIONS)
        rows = render_rows(shown, evaluations)
    except DataError as error:
        return OmittedSection(_TITLE, str(error))
    if not shown:
        return OmittedSection(_TITLE, f"no saved image belongs to {data_url}")
    return f"{_intro(shown, evaluations)}{rows}"


def _intro(shown: Sequence[Conversation], evaluations: Sequence[Evaluation]) -> str:
    judged = any(evaluation.judged for evaluation in evaluations)
    marks = (
        " Below it are its attributes; below the others, those that a rule read from their pixels."
        if judged
        else ""
    )
    return (
        f'<p class="intro">{len(shown)} conversations, selected by a hash of their keys, not by '
        "hand. Each shows the context of an image; the reference image is the one that was sent."
        f"{marks}</p>"
    )


def _row(
    conversation: Conversation,
    evaluations: Sequence[Evaluation],
    generated: Sequence[Mapping[str, bytes]],
) -> str:
    key = conversation.key
    examples = [_example(evaluation, key) for evaluation in evaluations]
    wanted = next((example["wanted"] for example in examples if example), None)
    shows = f": {', '.join(map(str, wanted.values()))}" if wanted else f" of {key}"
    alt = f"Reference image{shows}"
    figures = [_figure("Reference image", conversation.image, alt, _wanted(wanted))]
    for name, images, example in zip(column_names(evaluations), generated, examples, strict=True):
        alt = f"{name}: image generated for {key}"
        figures.append(
            _figure(name, images[key], alt, _read(example)) if key in images else _absent(name)
        )
    return (
        f'<article class="conversation" aria-label="{text(key)}">{_chat(conversation)}'
        f'<div class="images">{"".join(figures)}</div>'
        f'<p class="key">{text(key)}</p></article>'
    )


def _chat(conversation: Conversation) -> str:
    turns = "".join(
        f'<li dir="auto" class="{"ours" if speaker % 2 else "theirs"}">'
        f'<span class="hidden">Speaker {speaker + 1}: </span>{text(words)}</li>'
        for speaker, words in conversation.turns
    )
    return f'<ol class="chat" tabindex="0" aria-label="Conversation">{turns}</ol>'


def _figure(name: str, data: bytes | None, alt: str, attributes: str) -> str:
    caption = f"<figcaption>{text(name)}</figcaption>"
    return f"<figure>{caption}{image_tag(data, alt)}{attributes}</figure>"


def _absent(name: str) -> str:
    caption = f"<figcaption>{text(name)}</figcaption>"
    return f'<figure>{caption}<div class="no-image">no image saved</div></figure>'


def _example(evaluation: Evaluation, key: str) -> Mapping[str, Any] | None:
    found = ((evaluation.judged or {}).get("examples") or {}).get(key)
    return found if isinstance(found, dict) else None


def _wanted(wanted: Mapping[str, str] | None) -> str:
    if not wanted:
        return ""
    items = "".join(
        f'<li title="{text(name)}"><span class="hidden">{text(name)}: </span>{text(value)}</li>'
        for name, value in wanted.items()
    )
    return f'<ul class="read wanted">{items}</ul>'


def _read(example: Mapping[str, Any] | None) -> str:
    """List the attributes that the rule read, in the wanted order, each marked right or wrong."""
    if not example:
        return ""
    items = (
        _mark(attribute, value, example["read"].get(attribute))
        for attribute, value in example["wanted"].items()
    )
    return f'<ul class="read">{"".join(items)}</ul>'


def _mark(attribute: str, wanted: str, read: str | None) -> str:
    right = read == wanted
    sign, spoken = ("✓", "right") if right else ("✗", "wrong")
    return (
        f'<li class="{spoken}" title="{text(attribute)}: expected {text(wanted)}">'
        f'<span aria-hidden="true">{sign}</span>'
        f'<span class="hidden">{text(attribute)} {spoken}: </span> '
        f"{text(f'no {attribute}' if read is None else read)}</li>"
    )
