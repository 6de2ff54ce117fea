"""A dozen conversations as chat bubbles beside the reference image and the generated ones."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from d2i.corpora import corpus_title
from d2i.dialog import key_order_hash
from d2i.errors import DataError
from d2i.report.data_split import Conversation, first_of, read_conversations
from d2i.report.document import OmittedSection, Section
from d2i.report.embedded_images import image_uri
from d2i.report.evaluation import Evaluation, column_names

NUM_CONVERSATIONS = 12
_TITLE = "Conversations"
_CORRECTION = re.compile(
    r"(?:no,? wait|wait,? no|(?:sorry,? )?i meant?|actually|(?:hm+,? )?rather|scratch that|"
    r"oh no,? (?:it was|the|an?|[io]n|at|by|to|under|out|right|after))\b",
    re.IGNORECASE,
)
"""First words of a turn that corrects an earlier one."""


def conversations_section(
    evaluations: Sequence[Evaluation], cases: Sequence[str] = ()
) -> Section | OmittedSection:
    """Show conversations with the images of all systems, as in the paper's Tables 4, 6 and 7.

    Evaluations on different instances are shown separately.

    Args:
        evaluations: The systems.
        cases: The keys to show, in this order. If empty, the first keys, in their seeded order,
            that every system kept an image of; a success on a dialog with a correction leads.

    Raises:
        DataError: If a case is in no data set, or no system kept its image.
    """
    groups = group_by_instances(evaluations)
    if cases:
        parts = [gallery(shown, group) for shown, group in _cases(groups, cases) if shown]
        return Section("conversations", _TITLE, "conversations.html", {"galleries": parts})
    found = [_part(group, _corpus(group) if len(groups) > 1 else "") for group in groups]
    parts = [part for part in found if not isinstance(part, str)]
    if not parts:
        return OmittedSection(_TITLE, str(found[0]))
    return Section("conversations", _TITLE, "conversations.html", {"galleries": parts})


def gallery(
    shown: Sequence[Conversation],
    evaluations: Sequence[Evaluation],
    *,
    name: str = "",
    chosen: str | None = None,
) -> dict[str, Any]:
    """Return what the page shows of conversations and of the images that systems kept.

    Args:
        shown: The conversations, in order.
        evaluations: The systems.
        name: A heading.
        chosen: Why the first of those that d2i selected leads; empty if it does so by its hash.

    Raises:
        DataError: If a system's images cannot be read.
    """
    wanted = [conversation.key for conversation in shown]
    generated = [
        evaluation.read_images([key for key in wanted if key in evaluation.image_urls])
        for evaluation in evaluations
    ]
    rows = [_row(conversation, evaluations, generated) for conversation in shown]
    for rank, row in enumerate(sorted(rows, key=lambda row: -(row["score"] or 0.0))):
        row["rank"] = rank
    is_judged = any(evaluation.judged for evaluation in evaluations)
    return {
        "name": name,
        "chosen": chosen,
        "is_judged": is_judged,
        "system": column_names(evaluations)[-1],
        "sorted_by": "attributes right" if is_judged else "CLIP-I",
        "can_sort": len({row["score"] for row in rows} - {None}) > 1,
        "kinds": [
            kind
            for kind in ("corrected", "right", "wrong")
            if 0 < sum(kind in row["kinds"] for row in rows) < len(rows)
        ],
        "rows": rows,
    }


def group_by_instances(evaluations: Sequence[Evaluation]) -> list[list[Evaluation]]:
    """Group evaluations on the same conversations, in order of appearance."""
    groups: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations:
        card = evaluation.card
        identity = card.get("instances_sha256") or card.get("manifest_sha256")
        groups.setdefault(str(identity), []).append(evaluation)
    return list(groups.values())


def is_correction(words: str) -> bool:
    """Return whether a turn begins like a correction of an earlier one: `no wait, the blue one`."""
    return _CORRECTION.match(words) is not None


def _cases(
    groups: Sequence[Sequence[Evaluation]], cases: Sequence[str]
) -> list[tuple[list[Conversation], Sequence[Evaluation]]]:
    """Read the requested conversations of each group of evaluations."""
    wanted, read = list(dict.fromkeys(cases)), []
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
        read.append((shown, group))
    if unknown:
        key = next(key for key in wanted if key in unknown)
        example = read_conversations(_data_url(groups[0]), groups[0][0].image_urls, 1)
        such = f", such as {example[0].key}" if example else ""
        raise DataError(
            f"--case {key}: no instance of {_data_url(groups[0])} has this key; expected a key "
            f"from instances.jsonl{such}"
        )
    return read


def _data_url(evaluations: Sequence[Evaluation]) -> str:
    return str(evaluations[0].card.get("data", ""))


def _corpus(evaluations: Sequence[Evaluation]) -> str:
    corpus = evaluations[0].card.get("corpus")
    return corpus_title(str(corpus)) if corpus else ""


def _part(evaluations: Sequence[Evaluation], name: str) -> dict[str, Any] | str:
    """Return the gallery of systems evaluated on the same instances, or why there is none."""
    keys = set(evaluations[0].image_urls).intersection(*(e.image_urls for e in evaluations))
    if not keys:
        return "the evaluations saved no images of the same conversation"
    data_url = _data_url(evaluations)
    try:
        first, chosen = _success(evaluations, keys)
        shown = read_conversations(data_url, first, 1)
        rest = keys - set(first)
        shown += read_conversations(data_url, rest, NUM_CONVERSATIONS - len(shown))
        if not shown:
            return f"no saved image belongs to {data_url}"
        return gallery(shown, evaluations, name=name, chosen=chosen)
    except DataError as error:
        return str(error)


def _success(evaluations: Sequence[Evaluation], keys: Collection[str]) -> tuple[list[str], str]:
    """Find a success of the last system on a dialog with a correction; return it and the reason.

    With a judge, the first by hash with every attribute right, if possible not so of the first
    system; else the one of the highest CLIP-I.
    """
    last, data_url = evaluations[-1], _data_url(evaluations)
    hashed = sorted(keys, key=lambda key: key_order_hash(key, 0))
    if last.judged:
        right = [key for key in hashed if _is_right(last, key)]
        gained = [key for key in right if not _is_right(evaluations[0], key)]
        ordered = [*gained, *(key for key in right if key not in set(gained))]
        reason = "the judge read every attribute right"
    else:
        scores = {key: score for key in keys if (score := last.clip_i.get(key)) is not None}
        ordered = sorted(scores, key=lambda key: -scores[key])
        reason = "CLIP-I is the highest among such dialogs"
    found = first_of(
        data_url, ordered, lambda turns: any(is_correction(words) for _, words in turns)
    )
    if found is None:
        return [], ""
    return [found], f"a turn begins like a correction, and {reason}"


def _is_right(evaluation: Evaluation, key: str) -> bool:
    example = _example(evaluation, key)
    return example is not None and all(
        example["read"].get(name) == value for name, value in example["wanted"].items()
    )


def _row(
    conversation: Conversation,
    evaluations: Sequence[Evaluation],
    generated: Sequence[Mapping[str, bytes]],
) -> dict[str, Any]:
    key = conversation.key
    examples = [_example(evaluation, key) for evaluation in evaluations]
    wanted: Mapping[str, str] = next((example["wanted"] for example in examples if example), {})
    corrections = [place for place, turn in enumerate(conversation.turns) if is_correction(turn[1])]
    decisive = corrections[-1] if corrections else None
    shows = f": {', '.join(map(str, wanted.values()))}" if wanted else f" of {key}"
    images = [_image("Reference image", conversation.image, f"Reference image{shows}")]
    images[0]["wanted"] = wanted
    for name, evaluation, saved, example in zip(
        column_names(evaluations), evaluations, generated, examples, strict=True
    ):
        image = _image(name, saved.get(key), f"{name}: image generated for {key}")
        image |= {"is_saved": key in saved, "read": _read(example)}
        image["clip_i"] = None if example else evaluation.clip_i.get(key)
        images.append(image)
    kinds = ["corrected"] if corrections else []
    if examples[-1]:
        kinds.append("right" if _is_right(evaluations[-1], key) else "wrong")
    return {
        "key": key,
        "turns": [(*turn, place == decisive) for place, turn in enumerate(conversation.turns)],
        "images": images,
        "kinds": kinds,
        "score": _score(evaluations[-1], examples[-1], key),
    }


def _image(name: str, data: bytes | None, alt: str) -> dict[str, Any]:
    known = {"wanted": {}, "read": [], "is_saved": True, "clip_i": None}
    return {"name": name, "uri": image_uri(data), "alt": alt, **known}


def _example(evaluation: Evaluation, key: str) -> Mapping[str, Any] | None:
    found = ((evaluation.judged or {}).get("examples") or {}).get(key)
    return found if isinstance(found, dict) else None


def _read(example: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """List the attributes that the rule read, in the wanted order, each marked right or wrong."""
    if not example:
        return []
    return [
        {"attribute": name, "wanted": wanted, "read": example["read"].get(name)}
        for name, wanted in example["wanted"].items()
    ]


def _score(evaluation: Evaluation, example: Mapping[str, Any] | None, key: str) -> float | None:
    """Return the number of attributes that are right, else CLIP-I; None if neither is recorded."""
    if example:
        return float(sum(item["wanted"] == item["read"] for item in _read(example)))
    return evaluation.clip_i.get(key)
