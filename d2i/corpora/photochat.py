"""PhotoChat: `{train,dev,test}/*.json`, arrays of dialogs with the addresses of their photos.

Takes both releases, with and without `photo_id`. Must not import torch.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from d2i import storage
from d2i.corpora.layout import split_folder
from d2i.corpora.records import (
    Dialog,
    Flaw,
    Picture,
    RecordError,
    field,
    is_web_url,
    optional_field,
    speaker_of,
    turns_of,
)
from d2i.dialog import Direction, ImageRef, Turn
from d2i.errors import ConfigError

_PHOTO_ID = re.compile(r"(?:train|validation|test)/[0-9a-f]{1,32}")
_LABELS = re.compile(r"Objects in the photo:(.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class PhotoChat:
    """How PhotoChat becomes instances: one a dialog, cut where the photo is first shared."""

    open_images_url: str = "https://open-images-dataset.s3.amazonaws.com/{photo_id}.jpg"
    """Where a photo is asked for first; `photo_id` holds Open Images' split and id."""

    id_field: ClassVar[str] = "dialogue_id"
    direction: ClassVar[Direction] = "answer"

    def __post_init__(self) -> None:
        """Refuse an address template that would be the same for every photo."""
        if "{photo_id}" not in self.open_images_url:
            raise ConfigError(
                f"open_images_url: got {self.open_images_url!r}, expected a template; "
                "write {photo_id} where the id goes"
            )

    def files(self, source: str, split: str) -> list[str]:
        """List the split's files, relative to the source, in the order of their names."""
        folder = split_folder(source, split)
        if folder is None:
            return []
        names = storage.list_names(storage.join(source, folder))
        return [f"{folder}/{name}" for name in names if name.endswith(".json")]

    def parser(self, source: str, split: str) -> Callable[[dict[str, Any], Flaw], Dialog]:
        """Return what parses one record; source and split do not matter here."""
        del source, split
        return self._parse

    def context(self, turns: tuple[Turn, ...], turn: int) -> tuple[Turn, ...]:
        """Return the turns before the photo: its own turn says nothing."""
        return turns[:turn]

    def is_unique(self, split: str) -> bool:
        """Keep every dialog: the paper counts dialogs, in which photos may repeat."""
        del split
        return False

    def _parse(self, record: dict[str, Any], flaw: Flaw) -> Dialog:
        turns, shares = [], []
        for index, entry in enumerate(turns_of(record, "dialogue")):
            at = f"turn {index}"
            turns.append(Turn(speaker_of(entry, "user_id", at), field(entry, "message", str, at)))
            shares.append(field(entry, "share_photo", bool, at))
        if not any(shares):
            raise RecordError("no_image", "dialogue: no turn shares the photo")
        ref = ImageRef("urls", self._urls(record, flaw))
        description = optional_field(record, "photo_description", str)
        return Dialog(
            turns=tuple(turns),
            pictures=(Picture(shares.index(True), 0, ref),),
            description=description,
            labels=_labels(description or ""),
        )

    def _urls(self, record: dict[str, Any], flaw: Flaw) -> tuple[str, ...]:
        urls = []
        photo_id = optional_field(record, "photo_id", str)
        if photo_id and _PHOTO_ID.fullmatch(photo_id):
            urls.append(self.open_images_url.replace("{photo_id}", photo_id))
        elif photo_id:
            flaw("bad_image_ref", "photo_id: expected 'split/hex digits'; photo_url alone is used")
        url = optional_field(record, "photo_url", str)
        if url and is_web_url(url):
            urls.append(url)
        elif url:
            flaw("bad_image_ref", "photo_url: expected an http or https address")
        if not urls:
            raise RecordError("missing_field", "photo_url: neither it nor photo_id can be used")
        return tuple(urls)


def _labels(description: str) -> tuple[str, ...]:
    found = _LABELS.search(description)
    names = found[1].split(",") if found else []
    return tuple(name.strip() for name in names if name.strip())
