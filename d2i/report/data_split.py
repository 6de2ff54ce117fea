"""Reading a data set for a report: conversations, reference images, and manifests."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from d2i.dialog import NO_SPEAKER, SPLITS, key_order_hash
from d2i.errors import ShardError
from d2i.io import storage
from d2i.shards import ShardReader
from d2i.shards.manifest import MANIFEST_NAME, Manifest, read_manifest

Turns = tuple[tuple[int, str], ...]
"""The turns of a conversation: number of the speaker, text."""
_MAX_TRIED = 100


@dataclass(frozen=True)
class Conversation:
    """One sample: its key, its turns as (speaker number, text), and the source image's bytes."""

    key: str
    turns: Turns
    image: bytes | None


def read_conversations(data_url: str, keys: Collection[str], count: int) -> list[Conversation]:
    """Read the first `count` samples of `keys` in the seeded order of keys.

    The order is by a hash of the key, so samples are not picked by how they look.

    Raises:
        ShardError: If the data set cannot be read.
    """
    _check_local(data_url)
    reader = ShardReader(data_url)
    places = {key: place for place, key in enumerate(reader.keys) if key in keys}
    chosen = sorted(places, key=lambda key: key_order_hash(key, 0))[:count]
    return [
        Conversation(
            key,
            speaking_turns(reader.read_json(places[key])["context"]),
            reader.read_image(places[key]),
        )
        for key in chosen
    ]


def first_of(data_url: str, keys: Sequence[str], is_wanted: Callable[[Turns], bool]) -> str | None:
    """Return the first of the first hundred keys whose turns are wanted, if any.

    Raises:
        ShardError: If the data set cannot be read.
    """
    _check_local(data_url)
    reader = ShardReader(data_url)
    places = {key: place for place, key in enumerate(reader.keys)}
    for key in keys[:_MAX_TRIED]:
        if key in places and is_wanted(speaking_turns(reader.read_json(places[key])["context"])):
            return key
    return None


def speaking_turns(context: Sequence[dict[str, Any]]) -> Turns:
    """Number the speakers from 0; leave out turns without text, and those of `NO_SPEAKER`.

    A turn with an unnamed speaker answers the turn before it, as in `d2i.dialog.linearize`.
    """
    numbers: dict[int, int] = {}
    turns, speaker = [], None
    for turn in context:
        given = turn.get("speaker")
        if given == NO_SPEAKER:
            continue
        speaker = (1 if speaker == 0 else 0) if given is None else given
        if text := str(turn.get("text", "")).strip():
            turns.append((numbers.setdefault(speaker, len(numbers)), text))
    return tuple(turns)


def read_splits(data_url: str) -> dict[str, Manifest]:
    """Read the manifests of a data set directory and its sibling splits, in the order of `SPLITS`.

    Raises:
        ShardError: If there is none, or one is damaged.
    """
    _check_local(data_url)
    parent, _, own = data_url.rstrip("/").rpartition("/")
    names = list(SPLITS) if own in SPLITS else [own]
    urls = {name: f"{parent}/{name}" if parent else name for name in names}
    found = {
        name: read_manifest(url)
        for name, url in urls.items()
        if storage.exists(storage.join(url, MANIFEST_NAME))
    }
    if not found:
        raise ShardError(f"{data_url} has no {MANIFEST_NAME}")
    return found


def _check_local(data_url: str) -> None:
    """Raise for a URL with a host: it comes from a metric card, not from the user."""
    if storage.names_host(data_url):
        raise ShardError(
            f"the metric card's data set {data_url} is a URL with a host, which a report does not "
            "contact; evaluate with --data in a local directory or an object store"
        )
