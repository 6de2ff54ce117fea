"""Conversations: their turns, their linearization to one line of text, and the keys of instances.

Owns `Turn`, `ImageRef`, `Instance`, linearization, instance keys and the seeded order of keys.
Pure: reads no file and must not import torch, ray or any other part of d2i than errors. The three
types are msgspec structs, as a corpus makes millions of them: they cost a tenth of a frozen
dataclass, and are immutable as well.
"""

import difflib
import hashlib
import itertools
import operator
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Literal

from msgspec import Struct

from d2i.errors import ConfigError, DataError

Direction = Literal["answer", "first"]

TEMPLATES = {
    "hash": "# {text}",
    "space": "{text}",
    "special": "[PER{speaker}] {text}",
    "letters": "{letter}: {text}",
}
"""The named linearizations, each as the template of one turn."""

NO_SPEAKER = -1
"""The speaker of a turn outside the conversation, such as a system message."""

SPLITS = ("train", "valid", "test")
"""The splits of a corpus, by canonical name, in the order in which they are used."""

MAX_KEY_LENGTH = 88
"""A tar name holds 100 bytes, of which `.moments.npy` takes 12."""
KEY_PATTERN = rf"[A-Za-z0-9_][A-Za-z0-9_-]{{0,{MAX_KEY_LENGTH - 1}}}"
"""Form of any key in a shard: no dot (WebDataset ends a key at the first one), no slash, no leading
dash. Those of instances come from `make_key`."""

_PLACEHOLDER = re.compile(r"\{(text|speaker|letter)\}")
_PLAIN_SPLIT = re.compile(r"[A-Za-z0-9]{1,32}")
_PLAIN_ID = re.compile(r"(?!.*_[0-9a-f]{32}$)[A-Za-z0-9_-]{1,64}", re.DOTALL)
_UNSAFE = re.compile(r"[^A-Za-z0-9]+")
_KEY = re.compile(r"(([A-Za-z0-9_]+)-[A-Za-z0-9_-]+)-[0-9]+-[0-9]+")


class Turn(Struct, frozen=True, gc=False):
    """One message of a conversation.

    `speaker` is a small number, None if the corpus names no speaker and turns alternate, or
    `NO_SPEAKER` for a turn without one.
    """

    speaker: int | None
    text: str


class ImageRef(Struct, frozen=True, gc=False):
    """The source of an instance's image.

    `file`: one path, relative to the corpus source or its image root. `urls`: URLs of the same
    image, to be tried in order. `inline`: an image inside the record itself, as `inline:` and the
    sha256 of its content.
    """

    kind: Literal["file", "urls", "inline"]
    value: tuple[str, ...]


class Instance(Struct, frozen=True, gc=False):
    """One image together with the turns it answers (or, for `first`, the turns it opens).

    `turn` is the index, from 0, of the image's turn in its dialog; `image` its index among the
    images of that turn. `description` and `labels` are metadata and never part of the context;
    `description_by` names the model that wrote the description, None if it is the corpus's own.
    """

    key: str
    split: str
    dialog_id: str
    turn: int
    image: int
    context: tuple[Turn, ...]
    image_ref: ImageRef
    direction: Direction = "answer"
    description: str | None = None
    labels: tuple[str, ...] = ()
    description_by: str | None = None


def linearize(
    turns: Iterable[Turn],
    strategy: str = "hash",
    *,
    empty_turns: Literal["drop", "keep"] = "drop",
    speaker_runs: Literal["keep", "merge"] = "keep",
) -> str:
    """Join turns into one line, in their order, one space between them (paper, section 3.1).

    The speaker of the first turn written is speaker 1, or A. A turn without a speaker is assumed
    to answer the turn before it.

    Args:
        turns: The context, oldest turn first.
        strategy: `hash` ("# a # b"), `space` ("a b"), `special` ("[PER1] a [PER2] b"), `letters`
            ("A: a B: b"), or the template of one turn: `{text}`, and optionally `{speaker}`
            (1, 2, ...) and `{letter}` (A, B, ...).
        empty_turns: `drop` omits turns without text, `keep` writes their mark alone. Turns of
            `NO_SPEAKER` are always omitted.
        speaker_runs: `keep` writes a mark for each of several turns in a row by one speaker,
            `merge` one mark for all.

    Raises:
        ConfigError: If the strategy is neither a known name nor a template with `{text}`.
    """
    template = _template(strategy)
    numbers: dict[int, int] = {}
    parts = []
    for speaker, text in _joined(_spoken(turns, empty_turns), speaker_runs):
        number = numbers.setdefault(speaker, len(numbers) + 1)
        parts.append(_fill(template, text, number).strip())
    return " ".join(filter(None, parts))


def is_written(turn: Turn, empty_turns: str) -> bool:
    """Return whether `linearize` writes a turn, its mark at least."""
    return turn.speaker != NO_SPEAKER and (empty_turns == "keep" or bool(turn.text.strip()))


def make_key(split: str, dialog_id: str, turn: int, image: int) -> str:
    """Return an instance's key: `{split}-{dialog_id}-{turn}-{image}`, safe as a tar member's stem.

    The key holds only `A-Z a-z 0-9 _ -` and starts with a letter, a digit or `_`. A split or an
    id that is not plain (other characters, too long, or in the form of a replaced one) gets its
    characters replaced and a 128-bit hash appended, so different inputs keep different keys.

    Raises:
        DataError: If an index is negative.
    """
    if turn < 0 or image < 0:
        raise DataError(
            f"instance of dialog {dialog_id!r}: got turn {turn}, image {image}, expected indices "
            "from 0; count both from the start of the dialog"
        )
    return join_key(key_prefix(split, dialog_id), turn, image)


def key_prefix(split: str, dialog_id: str) -> str:
    """Return the prefix of the keys of all instances of one dialog, for `join_key`."""
    return f"{_safe_split(split)}-{_safe(dialog_id, _PLAIN_ID)}-"


def join_key(prefix: str, turn: int, image: int) -> str:
    """Return an instance's key as `make_key` does, from the `key_prefix` of its dialog."""
    return f"{prefix}{turn}-{image}"


def split_of_key(key: str) -> str | None:
    """Return the split of an instance's key, or None if the key is not in `make_key`'s form."""
    found = _KEY.fullmatch(key)
    return found[2] if found else None


def dialog_of_key(key: str) -> str:
    """Return the part of an instance's key that identifies its dialog: without turn and image.

    A key in another form than that of `make_key` identifies no dialog: its instance stands alone,
    and the whole key is returned.
    """
    found = _KEY.fullmatch(key)
    return found[1] if found else key


def key_order_hash(key: str, seed: int) -> int:
    """Return a key's rank in the seeded order of which `--limit` takes the smallest.

    Returns:
        An integer in [0, 2**64), the same on every machine and in every version.
    """
    return int.from_bytes(key_order_digests([key], seed), "big")


def key_order_digests(keys: Iterable[str], seed: int) -> bytes:
    """Return the `key_order_hash` of each key as 8 bytes, big-endian, concatenated."""
    start = hashlib.blake2b(f"{seed}:".encode(), digest_size=8, person=b"d2i-key-order")
    digests = []
    for key in keys:
        digest = start.copy()
        digest.update(key.encode())
        digests.append(digest.digest())
    return b"".join(digests)


def _template(strategy: str) -> str:
    if strategy in TEMPLATES:
        return TEMPLATES[strategy]
    if "{text}" in strategy:
        return strategy
    near = difflib.get_close_matches(strategy, TEMPLATES, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "write {text} where the turn's text goes"
    raise ConfigError(
        f"linearization: got {strategy!r}, expected {', '.join(TEMPLATES)} or a template with "
        f"{{text}}; {hint}"
    )


def _spoken(turns: Iterable[Turn], empty_turns: str) -> Iterator[tuple[int, str]]:
    """Yield speaker and text of every turn with text, or of every turn.

    A turn without text (an image alone) still hands over to the other speaker.
    """
    speaker: int | None = None
    for turn in turns:
        if turn.speaker == NO_SPEAKER:
            continue
        other = 1 if speaker == 0 else 0
        speaker = other if turn.speaker is None else turn.speaker
        if is_written(turn, empty_turns):
            yield speaker, turn.text.strip()


def _joined(spoken: Iterable[tuple[int, str]], speaker_runs: str) -> Iterable[tuple[int, str]]:
    """Join the turns in a row by one speaker, if `speaker_runs` is `merge`."""
    if speaker_runs == "keep":
        return spoken
    runs = itertools.groupby(spoken, key=operator.itemgetter(0))
    return ((speaker, " ".join(text for _, text in run if text)) for speaker, run in runs)


def _fill(template: str, text: str, number: int) -> str:
    """Fill one turn's template in a single pass, so that braces in the text stay text."""
    values = {"text": text, "speaker": str(number), "letter": _letter(number)}
    return _PLACEHOLDER.sub(lambda found: values[found[1]], template)


def _letter(number: int) -> str:
    """Return A ... Z, AA, AB, ... for 1, 2, ..."""
    rest, last = divmod(number - 1, 26)
    return (_letter(rest) if rest else "") + chr(ord("A") + last)


@lru_cache(maxsize=8)
def _safe_split(split: str) -> str:
    return _safe(split, _PLAIN_SPLIT)


def _safe(part: str, plain: re.Pattern[str]) -> str:
    if plain.fullmatch(part):
        return part
    digest = hashlib.blake2b(part.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return f"{_UNSAFE.sub('_', part)[:24]}_{digest}"
