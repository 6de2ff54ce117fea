"""What a conversation is, how it becomes one line of text, and how an instance is named.

Owns `Turn`, `ImageRef`, `Instance`, linearization, instance keys and the order that keys are
drawn in. Pure: reads no file and must not import torch, ray or any other part of d2i than errors.
The three are msgspec structs, as a corpus makes millions of them: those cost a tenth of a frozen
dataclass, and refuse changes as well.
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
"""The speaker of a turn that is no part of the talk, such as a system's message."""

_PLACEHOLDER = re.compile(r"\{(text|speaker|letter)\}")
_PLAIN_SPLIT = re.compile(r"[A-Za-z0-9]{1,32}")
_PLAIN_ID = re.compile(r"(?!.*_[0-9a-f]{32}$)[A-Za-z0-9_-]{1,64}", re.DOTALL)
_UNSAFE = re.compile(r"[^A-Za-z0-9]+")
_KEY = re.compile(r"([A-Za-z0-9_]+-[A-Za-z0-9_-]+)-[0-9]+-[0-9]+")


class Turn(Struct, frozen=True, gc=False):
    """One message of a conversation.

    `speaker` is a small number, or None where the corpus names no speaker and turns alternate, or
    `NO_SPEAKER` where nobody says it.
    """

    speaker: int | None
    text: str


class ImageRef(Struct, frozen=True, gc=False):
    """Where the picture of an instance is to be had.

    `file`: one path, relative to the corpus source or its image root. `urls`: addresses of the
    same picture, to be tried in order. `inline`: a picture that stood in the record itself, as
    `inline:` and the sha256 of its content.
    """

    kind: Literal["file", "urls", "inline"]
    value: tuple[str, ...]


class Instance(Struct, frozen=True, gc=False):
    """One picture together with the turns it answers (or, for `first`, the turns it opens).

    `turn` is the index, from 0, of the picture's turn in its dialog; `image` its index among the
    pictures of that turn. `description` and `labels` are metadata and never part of the context;
    `description_by` names the model that made the description, None where the corpus has it.
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
    """Write turns as one line, in their order, one space between them (paper, section 3.1).

    The first speaker who says something is speaker 1, or A. A turn without a speaker is taken to
    answer the turn before it.

    Args:
        turns: The context, oldest turn first.
        strategy: `hash` ("# a # b"), `space` ("a b"), `special` ("[PER1] a [PER2] b"), `letters`
            ("A: a B: b"), or the template of one turn: `{text}`, and, where wanted, `{speaker}`
            (1, 2, ...) and `{letter}` (A, B, ...).
        empty_turns: `drop` leaves turns without text out, `keep` writes their mark alone. Nobody's
            turns are left out in any case.
        speaker_runs: Whether turns in a row by one speaker each get a mark, or one in all.

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
    """Say whether `linearize` writes a turn, its mark at least."""
    return turn.speaker != NO_SPEAKER and (empty_turns == "keep" or bool(turn.text.strip()))


def make_key(split: str, dialog_id: str, turn: int, image: int) -> str:
    """Name an instance: `{split}-{dialog_id}-{turn}-{image}`, safe as a tar member's stem.

    The key holds only `A-Z a-z 0-9 _ -` and starts with a letter, a digit or `_`. A split or an
    id that is not plain (other characters, over-long, or made to look like a changed one) gets
    its characters replaced and a 128-bit hash appended, so different inputs keep different keys.

    Raises:
        DataError: If an index is negative.
    """
    if turn < 0 or image < 0:
        raise DataError(
            f"instance of dialog {dialog_id!r}: got turn {turn}, image {image}, expected indices "
            "from 0; count both from the start of the dialog"
        )
    return f"{key_prefix(split, dialog_id)}{turn}-{image}"


def key_prefix(split: str, dialog_id: str) -> str:
    """Return what the keys of all instances of one dialog begin with, for `make_key`."""
    return f"{_safe_split(split)}-{_safe(dialog_id, _PLAIN_ID)}-"


def dialog_of_key(key: str) -> str:
    """Return what names the dialog of an instance: its key without turn and image.

    A key of another form than `make_key` gives tells of no dialog: its instance stands alone, and
    the whole key is returned.
    """
    found = _KEY.fullmatch(key)
    return found[1] if found else key


def key_order_hash(key: str, seed: int) -> int:
    """Place a key in the seeded order that `--limit` takes its smallest from.

    Returns:
        An integer in [0, 2**64), the same on every machine and in every version.
    """
    return int.from_bytes(key_order_digests([key], seed), "big")


def key_order_digests(keys: Iterable[str], seed: int) -> bytes:
    """Return the `key_order_hash` of each key as 8 bytes, big end first, laid end to end."""
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
    """Give speaker and text of every turn that says something, or of every turn.

    A silent turn (a picture alone) still passes the word on to the other speaker.
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
    """Join what one speaker says in a row, where that is asked for."""
    if speaker_runs == "keep":
        return spoken
    runs = itertools.groupby(spoken, key=operator.itemgetter(0))
    return ((speaker, " ".join(text for _, text in run if text)) for speaker, run in runs)


def _fill(template: str, text: str, number: int) -> str:
    """Fill one turn's template in a single pass, so that braces in the text stay text."""
    values = {"text": text, "speaker": str(number), "letter": _letter(number)}
    return _PLACEHOLDER.sub(lambda found: values[found[1]], template)


def _letter(number: int) -> str:
    """Count 1, 2, ... as A ... Z, AA, AB, ..."""
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
