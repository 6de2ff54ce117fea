"""Text of the demo's made world: captions of a scene, and dialogs that lead up to its image.

A dialog names the attributes over several turns, with small talk in between, and in about a third
of the cases corrects itself ("no wait, the blue one"). The last statement counts. Imports only
`scene` from d2i.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from d2i.demo.scene import ATTRIBUTES, Scene

MAX_TURNS = 13
# The window is 75 tokens. Here a word, a punctuation mark, or the '#' before a turn is one token.
MAX_CONTEXT_TOKENS = 72
CORRECTED_SHARE = 0.37

_WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "size": {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")},
    "position": {
        "left": ("on the left", "to the left", "on the left side"),
        "middle": ("in the middle", "in the center", "right in the middle"),
        "right": ("on the right", "to the right", "on the right side"),
    },
    "place": {
        "meadow": ("on a meadow", "in the meadow", "on the grass"),
        "beach": ("on the beach", "at the beach", "on the sand"),
        "sea": ("on the sea", "out at sea", "on the ocean"),
        "snow": ("in the snow", "on the snow", "in the snowy mountains"),
    },
    "time": {
        "day": ("by day", "at noon", "in daylight"),
        "evening": ("in the evening", "at sunset", "at dusk"),
        "night": ("at night", "under the moon", "after dark"),
    },
}
_CAPTIONS = (
    "{object} {position} {place} {time}",
    "{object} {place} {time}, {position}",
    "{time}, {object} {place}, {position}",
    "{position}, {object} {place} {time}",
    "a picture of {object} {position}, {place}, {time}",
    "{place} {time} there is {object} {position}",
    "{object}, {position}, seen {place} {time}",
)
_SEEN = ("i saw {}", "there was {}", "we found {}", "i took a photo of {}", "imagine {}")
_LOOKED = ("it was {}", "it looked {}", "the thing was {}")
_STOOD = ("it stood {}", "it was {}", "you see it {}")
_HAPPENED = ("this was {}", "i was {}", "we were {}")
_FIXES = ("no wait, {}", "sorry, i meant {}", "actually, {}", "oh no, {}", "hm, rather {}")
_QUESTIONS = {
    "shape": ("what did you see?", "what was there?"),
    "colour": ("which color?", "what color was it?"),
    "size": ("was it big or small?", "how big?"),
    "position": ("where exactly?", "left or right?"),
    "place": ("where was that?", "where were you?"),
    "time": ("when was that?", "day or night?"),
}
_REPLIES = (
    "oh nice",
    "ok",
    "really?",
    "haha ok",
    "tell me more",
    "cool :thumbs_up:",
    "i see",
    "wow",
)
_CHAT = (
    ("hi, how are you?", "good morning :sun:", "hey, long time", "how was your week?"),
    ("fine, thanks", "busy as always", "great, and you?", "so so, a lot of work"),
)
_SHOW = ("here it is", "look, this is the photo", "here you go :camera:", "take a look", "see?")
_AFTER = (
    "wow, beautiful!",
    "i love it :sparkles:",
    "so pretty",
    "thanks for sharing",
    "great shot",
)
_MORE = (
    "and another one",
    "next day i went again",
    "i have one more",
    "then there was another trip",
)


@dataclass(frozen=True)
class MadeTurn:
    """One turn: its text, and the scene of the image that is sent with it, if any."""

    text: str
    scene: Scene | None = None


def caption(scene: Scene, rng: random.Random) -> str:
    """Return one sentence that names all six attributes, in varied wording."""
    phrases = {name: _phrase(scene, name, rng) for name in ("position", "place", "time")}
    return rng.choice(_CAPTIONS).format(object=_object(scene, set(ATTRIBUTES), rng), **phrases)


def make_dialog(scene: Scene, rng: random.Random, second: Scene | None = None) -> list[MadeTurn]:
    """Make a dialog of 3 to 13 turns about a scene.

    Args:
        scene: the scene of the first image.
        rng: source of all other choices.
        second: the scene of a second image, described in full after the first.

    Returns:
        The turns, two speakers alternating. Everything about an image is stated in the
        `MAX_CONTEXT_TOKENS` tokens before it, its own turn included.
    """
    while True:
        turns = _part(scene, rng, second is None)
        if second is not None:
            turns += [MadeTurn(rng.choice(_AFTER)), *_part(second, rng, True, rng.choice(_MORE))]
        turns += [MadeTurn(rng.choice(_AFTER)) for _ in range(rng.choice((0, 0, 1, 2)))]
        if 3 <= len(turns) <= MAX_TURNS:
            return turns


def contexts(turns: Sequence[MadeTurn]) -> list[tuple[list[str], Scene]]:
    """Return for each image the non-empty texts up to and including its turn, and its scene."""
    return [
        ([t.text for t in turns[: index + 1] if t.text], turn.scene)
        for index, turn in enumerate(turns)
        if turn.scene is not None
    ]


def count_tokens(texts: Sequence[str]) -> int:
    """Return the maximum number of tokens of the texts, with '#' before each."""
    return sum(1 + len(re.findall(r"[a-z]+|[^\sa-z]", text)) for text in texts)


def _part(
    scene: Scene, rng: random.Random, chatty: bool, opening: str | None = None
) -> list[MadeTurn]:
    """Return the turns that lead up to one image, its own turn last."""
    while True:
        texts = [] if opening is None else [opening]
        if chatty and opening is None and rng.random() < 0.4:
            texts += [rng.choice(line) for line in _CHAT]
        texts += _describe(scene, rng, has_replies=opening is None or rng.random() < 0.5)
        texts.append(rng.choice(_SHOW) if rng.random() < 0.85 else "")
        if count_tokens(texts) <= MAX_CONTEXT_TOKENS:
            return [*(MadeTurn(text) for text in texts[:-1]), MadeTurn(texts[-1], scene)]


def _describe(scene: Scene, rng: random.Random, has_replies: bool) -> list[str]:
    """Return statements of all attributes, the other's replies between, and maybe a correction."""
    groups = _groups(rng)
    wrong = _mislead(scene, rng) if rng.random() < CORRECTED_SHARE else None
    texts: list[str] = []
    for index, group in enumerate(groups):
        if index and has_replies:
            question = rng.choice(_QUESTIONS[group[0]])
            texts.append(question if rng.random() < 0.6 else rng.choice(_REPLIES))
        texts.append(_state(wrong or scene, group, rng))
    if wrong is not None:
        changed = next(n for n in ATTRIBUTES if getattr(wrong, n) != getattr(scene, n))
        texts += [rng.choice(_REPLIES)] * (rng.random() < 0.5)
        texts.append(rng.choice(_FIXES).format(_fix(scene, changed, rng)))
    return texts


def _groups(rng: random.Random) -> list[list[str]]:
    """Split the six attributes into 2 to 4 groups, the shape in the first or the second."""
    names = [name for name in ATTRIBUTES if name != "shape"]
    rng.shuffle(names)
    names.insert(rng.randrange(2), "shape")
    num_groups = rng.choice((2, 2, 3, 3, 4))
    cuts = sorted(rng.sample(range(1, len(names)), num_groups - 1))
    return [names[a:b] for a, b in zip([0, *cuts], [*cuts, len(names)], strict=True)]


def _mislead(scene: Scene, rng: random.Random) -> Scene:
    """Return the scene with one attribute changed."""
    values = scene.attributes()
    name = rng.choice(list(ATTRIBUTES))
    values[name] = rng.choice([v for v in ATTRIBUTES[name] if v != values[name]])
    return Scene(**values)


def _state(scene: Scene, group: Sequence[str], rng: random.Random) -> str:
    """Return one statement about the attributes of a group."""
    places = [_phrase(scene, name, rng) for name in ("position", "place", "time") if name in group]
    if "shape" in group:
        return " ".join([rng.choice(_SEEN).format(_object(scene, set(group), rng)), *places])
    features = [_phrase(scene, name, rng) for name in ("size", "colour") if name in group]
    if features:
        return " ".join([rng.choice(_LOOKED).format(" and ".join(features)), *places])
    frame = _STOOD if "position" in group else _HAPPENED
    return rng.choice(frame).format(" ".join(places))


def _fix(scene: Scene, name: str, rng: random.Random) -> str:
    """Return the words that correct one attribute."""
    phrase = _phrase(scene, name, rng)
    if name in ("position", "place", "time"):
        return rng.choice(("it was {}", "{}")).format(phrase)
    if name == "shape":
        return rng.choice(("it was a {}", "a {}")).format(phrase)
    return rng.choice(("the {} one", "it was {}", "a {} one")).format(phrase)


def _object(scene: Scene, named: set[str], rng: random.Random) -> str:
    words = [_phrase(scene, name, rng) for name in ("size", "colour", "shape") if name in named]
    return " ".join(["a", *words])


def _phrase(scene: Scene, name: str, rng: random.Random) -> str:
    value: str = getattr(scene, name)
    return rng.choice(_WORDS[name][value]) if name in _WORDS else value
