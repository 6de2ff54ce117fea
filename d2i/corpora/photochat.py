"""PhotoChat: `{train,dev,test}/*.json`, arrays of dialogs with the URLs of their photos.

Reads both releases, with and without `photo_id`. Must not import torch.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar
from urllib.parse import urlsplit

from msgspec import Struct

from d2i.corpora.base import Corpus
from d2i.corpora.inline import InlineImages
from d2i.corpora.records import (
    Dialog,
    DialogId,
    RecordError,
    ReportIssue,
    SharedImage,
    Speaker,
    Text,
    Turns,
    is_web_url,
)
from d2i.corpora.splits import split_directory
from d2i.dialog import ImageRef, Turn
from d2i.errors import ConfigError
from d2i.io import storage

_PHOTO_ID = re.compile(r"(?:train|validation|test)/[0-9a-f]{1,32}")
_LABELS = re.compile(r"Objects in the photo:(.*)", re.DOTALL)


class _Message(Struct, gc=False):
    message: Text
    share_photo: bool
    user_id: Speaker


class PhotoChatRecord(Struct, gc=False):
    """One dialog of a release file."""

    dialogue_id: DialogId
    dialogue: Turns[_Message]
    photo_description: str | None = None
    photo_url: str | None = None
    photo_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class PhotoChat(Corpus):
    """Options for PhotoChat: one instance per dialog, cut where the photo is first shared."""

    open_images_url: str = "https://open-images-dataset.s3.amazonaws.com/{photo_id}.jpg"
    """Template of the URL that is tried first; `photo_id` holds Open Images' split and id."""

    title: ClassVar[str] = "PhotoChat"
    licence: ClassVar[str] = (
        "Dialogs CC BY 4.0; the photos are of Open Images, which lists them as CC BY 2.0."
    )
    record_type: ClassVar[type[Struct]] = PhotoChatRecord
    record_fields: ClassVar[frozenset[str]] = frozenset({"dialogue"})
    has_categories: ClassVar[bool] = True
    has_captions: ClassVar[bool] = True
    has_own_text: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Raise ConfigError for a URL template that would be the same for every photo."""
        if "{photo_id}" not in self.open_images_url:
            raise ConfigError(
                f"open_images_url: got {self.open_images_url!r}, expected a template; "
                "write {photo_id} where the id goes"
            )

    def files(self, source: str, split: str) -> list[str]:
        """List the split's files, relative to the source, sorted by name."""
        directory = split_directory(source, split)
        if directory is None:
            return []
        names = storage.list_names(storage.join(source, directory))
        files = [name for name in names if name.endswith(".json") and not name.startswith(".")]
        return [f"{directory}/{name}" for name in files]

    def image_id(self, ref: ImageRef) -> str:
        """Return the identity of a photo: its Flickr path; releases and hosts differ in the rest.

        Without one, it is path and query of the Open Images URL: the id may be in either.
        """
        address = ref.value[-1]
        parts = urlsplit(address)
        is_made = address.startswith(self.open_images_url.partition("{photo_id}")[0])
        return f"{parts.path}?{parts.query}" if is_made and parts.query else parts.path

    def parser(
        self, source: str, split: str, inline: InlineImages
    ) -> Callable[[PhotoChatRecord, ReportIssue], Dialog]:
        """Return the parser of one record; the arguments do not matter here."""
        del source, split, inline
        return self._parse

    def _parse(self, record: PhotoChatRecord, report_issue: ReportIssue) -> Dialog:
        shares = [message.share_photo for message in record.dialogue]
        if not any(shares):
            raise RecordError("no_image", "dialogue: no turn shares the photo")
        ref = ImageRef("urls", self._urls(record, report_issue))
        return Dialog(
            id=str(record.dialogue_id),
            turns=tuple(Turn(message.user_id, message.message) for message in record.dialogue),
            images=(SharedImage(shares.index(True), 0, ref),),
            description=record.photo_description,
            labels=_labels(record.photo_description or ""),
        )

    def _urls(self, record: PhotoChatRecord, report_issue: ReportIssue) -> tuple[str, ...]:
        urls = []
        if record.photo_id and _PHOTO_ID.fullmatch(record.photo_id):
            urls.append(self.open_images_url.replace("{photo_id}", record.photo_id))
        elif record.photo_id:
            report_issue(
                "bad_image_ref", "photo_id: expected 'split/hex digits'; photo_url alone is used"
            )
        if record.photo_url and is_web_url(record.photo_url):
            urls.append(record.photo_url)
        elif record.photo_url:
            report_issue("bad_image_ref", "photo_url: expected an http or https URL")
        if not urls:
            raise RecordError("missing_field", "neither photo_url nor photo_id can be used")
        return tuple(urls)


def _labels(description: str) -> tuple[str, ...]:
    found = _LABELS.search(description)
    names = found[1].split(",") if found else []
    return tuple(name.strip() for name in names if name.strip())
