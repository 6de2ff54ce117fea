"""MMDialog: `{train,valid,test}/conversations.json` beside flat `{split}/{media_key}.jpg`.

The release names no speakers; turns are taken to alternate. Its negative candidates are never
kept. Must not import torch.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from d2i import storage
from d2i.corpora.layout import split_folder
from d2i.corpora.records import (
    Dialog,
    Flaw,
    Picture,
    RecordError,
    field,
    turns_of,
    typed,
)
from d2i.dialog import Direction, ImageRef, Turn

_SUFFIXES = (".json", ".jsonl", ".txt")
_MEDIA_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")
# carpedm20/emoji's names: a letter first, or the medals' "1st_place_medal"; curly quotes occur.
_EMOJI = re.compile(r":(?:[^\W\d]|[123](?:st|nd|rd)_)[\w\u2019\u201c\u201d.&!()#*,-]*:")


@dataclass(frozen=True, kw_only=True)
class MMDialog:
    """How MMDialog becomes instances: one for each occurrence of a picture.

    Every option names a point that the paper leaves open; the defaults are this project's reading.
    """

    own_turn: Literal["include", "exclude"] = "include"
    """Whether the text of the picture's own turn belongs to its context."""
    images_in_turn: Literal["all", "first"] = "all"
    """Whether each picture of a turn is an instance, or the first alone."""
    repeated: Literal["default", "all", "unique"] = "default"
    """Keep every occurrence of a picture within the split, or its first one. The default keeps
    all in train and the first in valid and test, as the paper's counts do."""
    emoji: Literal["keep", "drop"] = "keep"
    """Whether `:raising_hands:` stays in the text."""
    image_root: str | None = None
    """URL of the folder that holds the pictures, where it is another than the source. With a
    folder a split, or all pictures in one."""

    id_field: ClassVar[str] = "conversation_id"
    direction: ClassVar[Direction] = "answer"

    def files(self, source: str, split: str) -> list[str]:
        """List the split's files, relative to the source: `conversations`, or all that say so."""
        folder = split_folder(source, split)
        if folder is None:
            return []
        # Asked for by name first: the folder also holds up to 1.5 million pictures.
        exact = (f"{folder}/conversations{suffix}" for suffix in _SUFFIXES)
        for path in exact:
            if storage.exists(storage.join(source, path)):
                return [path]
        names = storage.list_names(storage.join(source, folder))
        return [f"{folder}/{n}" for n in names if "conversations" in n and n.endswith(_SUFFIXES)]

    def parser(self, source: str, split: str) -> Callable[[dict[str, Any], Flaw], Dialog]:
        """Return what parses one record of a split."""
        folder = split_folder(self.image_root or source, split)
        image_dir = f"{folder}/" if folder else ""
        return lambda record, flaw: self._parse(record, image_dir, flaw)

    def context(self, turns: tuple[Turn, ...], turn: int) -> tuple[Turn, ...]:
        """Return the turns that a picture in this turn answers."""
        return turns[: turn + 1] if self.own_turn == "include" else turns[:turn]

    def is_unique(self, split: str) -> bool:
        """Say whether a picture is kept once a split."""
        return self.repeated == "unique" or (self.repeated == "default" and split != "train")

    def _parse(self, record: dict[str, Any], image_dir: str, flaw: Flaw) -> Dialog:
        read = [
            _read_turn(turn, f"turn {index}")
            for index, turn in enumerate(turns_of(record, "conversation"))
        ]
        turns = tuple(Turn(None, self._text(texts)) for texts, _ in read)
        pictures = []
        for turn, (_, keys) in enumerate(read):
            for image, key in enumerate(keys[: 1 if self.images_in_turn == "first" else None]):
                if _MEDIA_KEY.fullmatch(key):
                    ref = ImageRef("file", (f"{image_dir}{key}.jpg",))
                    pictures.append(Picture(turn, image, ref))
                else:
                    flaw("bad_image_ref", f"turn {turn} image {image}: no plain media key")
        return Dialog(turns, tuple(pictures))

    def _text(self, texts: list[str]) -> str:
        text = " ".join(texts)
        return " ".join(_EMOJI.sub(" ", text).split()) if self.emoji == "drop" else text


def _read_turn(turn: object, at: str) -> tuple[list[str], list[str]]:
    """Return the texts and the media keys of one turn, each in order."""
    texts, keys = [], []
    for part in field(turn, "turn", list, at):
        parts = typed(part, dict, f"{at} part")
        if "__TEXT__" in parts:
            texts.append(field(parts, "__TEXT__", str, at))
        elif "__MEDIA__" in parts:
            keys.append(_read_key(parts["__MEDIA__"], at))
        else:
            raise RecordError("missing_field", f"{at}: a part has neither __TEXT__ nor __MEDIA__")
    return texts, keys


def _read_key(value: object, at: str) -> str:
    return str(value) if type(value) is int else typed(value, str, f"{at} __MEDIA__")
