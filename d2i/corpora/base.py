"""The interface of a corpus: its facts, the parser of its records, and the instances of a dialog.

A corpus is a subclass of `Corpus` with `files` and `parser`; `registry` has its name. The paper
leaves open which images and turns of a dialog count. Each such point is an option here, with this
project's reading as its default, the same for every corpus. Must not import torch.
"""

import itertools
import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

from d2i.corpora.inline import InlineImages
from d2i.corpora.json_stream import MAX_RECORD_BYTES
from d2i.corpora.records import Dialog, ReportIssue, SharedImage
from d2i.dialog import Direction, ImageRef, Instance, Turn, join_key, key_prefix
from d2i.errors import ConfigError

# Names of carpedm20/emoji start with a letter, or as in "1st_place_medal"; some have curly quotes.
_EMOJI = re.compile(r":(?:[^\W\d]|[123](?:st|nd|rd)_)[\w\u2019\u201c\u201d.&!()#*,-]*:")


@dataclass(frozen=True, kw_only=True)
class Corpus(ABC):
    """A corpus with its options set; the fields are the options that all corpora have."""

    direction: Direction = "answer"
    """`answer`: the context is the turns before the image. `first`: the image comes first, and the
    context is the turns after it."""
    own_turn: Literal["default", "include", "exclude"] = "default"
    """Include the text of the image's own turn in its context, or exclude it. By default it is
    included with `answer` and excluded with `first`; in PhotoChat that turn has no text."""
    images_in_turn: Literal["all", "first"] = "all"
    """Make an instance of every image of a turn, or only of the first one with a usable name."""
    repeated: Literal["default", "all", "unique"] = "default"
    """Keep every occurrence of an image within the split, or only the first. By default every one,
    but only the first in MMDialog's valid and test, which matches the paper's counts."""
    earlier_images: str = ""
    """Text inserted into the context for each image shared before this one (or, with `first`, in a
    later turn), such as `[photo]`; empty as in the paper, which reads text only."""
    emoji: Literal["keep", "unicode", "drop"] = "keep"
    """Keep `:raising_hands:`, replace it with the character, or drop it."""

    descriptions: str | None = None
    """File of descriptions written by `d2i corpus --describe`, for images without one."""
    image_root: str | None = None
    """URL of the directory of the images, if it is not the source."""

    title: ClassVar[str]
    """Its name in tables and on pages."""
    licence: ClassVar[str]
    """The terms of its dialogs and images, in one sentence."""
    record_type: ClassVar[type]
    """The type that a record is decoded as, by msgspec."""
    record_fields: ClassVar[frozenset[str]]
    """A record that has one of these fields is of this corpus."""
    has_categories: ClassVar[bool] = False
    """True if its labels are those of the categories that evaluations are scored by."""
    has_captions: ClassVar[bool] = False
    """True if its images have descriptions of their own."""
    has_negatives: ClassVar[bool] = False
    """True if it lists negative candidates: images that do not answer a dialog."""
    max_record_bytes: ClassVar[int] = MAX_RECORD_BYTES
    """A longer record is skipped."""
    has_own_text: ClassVar[bool] = True
    """True if the turn of an image that answers can have text of its own."""
    unique_splits: ClassVar[frozenset[str]] = frozenset()
    """Splits in which `repeated` keeps only the first occurrence of an image by default."""

    @abstractmethod
    def files(self, source: str, split: str) -> list[str]:
        """List the split's files, relative to the source's directory, in a fixed order."""

    @abstractmethod
    def parser(
        self, source: str, split: str, inline: InlineImages
    ) -> Callable[[Any, ReportIssue], Dialog]:
        """Return the parser of one record of a split; it raises `RecordError`.

        Args:
            source: URL of the corpus.
            split: `train`, `valid` or `test`.
            inline: Keeps the images that a record embeds.
        """

    def negatives(self, source: str, split: str) -> Iterator[tuple[str, list[str]]]:
        """Read the negative candidates of a split: (dialog id, `image_id` of each).

        Raises:
            ConfigError: If the corpus lists none (`has_negatives`).
        """
        raise ConfigError(
            f"--negatives {source}: {self.title} lists no negative candidates for {split}; leave "
            "out --negatives"
        )

    def split_by(self) -> tuple[dict[str, float], int] | None:
        """Return the shares and the seed that divide one unsplit file; None for a split corpus."""
        return None

    def is_unique(self, split: str) -> bool:
        """Return whether an image is kept only once per split."""
        return self.repeated == "unique" or (
            self.repeated == "default" and split in self.unique_splits
        )

    def image_id(self, ref: ImageRef) -> str:
        """Return the identity of an image: equal wherever it occurs, in any split."""
        return ref.value[-1]

    def instances(
        self, dialog: Dialog, split: str, report_issue: ReportIssue
    ) -> Iterator[Instance]:
        """Make the instances of one dialog, in the order of its images.

        An image with an empty context gives no instance and is reported to `report_issue`.
        """
        turns = self._texts(dialog)
        prefix = key_prefix(split, dialog.id)
        first, last = _spoken_span(turns)
        begin, end = self._context_bounds
        for shared in self._chosen(dialog.images):
            turn, image = shared.turn, shared.image
            # One end of the context moves with the image, the other is that of the dialog.
            start = 0 if begin is None else turn + begin
            stop = len(turns) if end is None else turn + end
            if first >= stop or last < start:
                report_issue("empty_context", f"turn {turn} image {image}: its context has no text")
                continue
            context = turns[start:stop]
            if self.earlier_images:
                context = self._mark_images(context, start, shared, dialog.images)
            yield Instance(
                join_key(prefix, turn, image),
                split,
                dialog.id,
                turn,
                image,
                context,
                shared.ref,
                self.direction,
                dialog.description,
                dialog.labels,
            )

    def _chosen(self, images: tuple[SharedImage, ...]) -> Iterable[SharedImage]:
        if self.images_in_turn == "all":
            return images
        turns = itertools.groupby(images, key=operator.attrgetter("turn"))
        return (next(of_turn) for _, of_turn in turns)

    @cached_property
    def _context_bounds(self) -> tuple[int | None, int | None]:
        """Return the start and end of a context, relative to the image's turn.

        None stands for the start or end of the dialog.
        """
        answers = self.direction == "answer"
        own = self.own_turn
        if own == "default":
            own = "include" if answers and self.has_own_text else "exclude"
        return (None, int(own == "include")) if answers else (int(own == "exclude"), None)

    def _texts(self, dialog: Dialog) -> tuple[Turn, ...]:
        if self.emoji == "keep":
            return dialog.turns
        rewrite = _drop_emoji if self.emoji == "drop" else _render_emoji
        return tuple(Turn(turn.speaker, rewrite(turn.text)) for turn in dialog.turns)

    def _mark_images(
        self,
        context: tuple[Turn, ...],
        start: int,
        own: SharedImage,
        images: tuple[SharedImage, ...],
    ) -> tuple[Turn, ...]:
        """Append a mark to a turn for each of its images that is earlier, or of a later turn."""
        marks: dict[int, str] = {}
        for other in images:
            if (other.turn, other.image) < (own.turn, own.image) or other.turn > own.turn:
                marks[other.turn] = f"{marks.get(other.turn, '')} {self.earlier_images}"
        return tuple(
            Turn(turn.speaker, f"{turn.text}{marks.get(index, '')}".strip())
            for index, turn in enumerate(context, start)
        )


def _spoken_span(turns: tuple[Turn, ...]) -> tuple[int, int]:
    """Return the indices of the first and the last turn with text; (N, -1) if there is none."""
    first, last = 0, len(turns) - 1
    while first <= last and not turns[first].text.strip():
        first += 1
    if first > last:
        return len(turns), -1
    while not turns[last].text.strip():
        last -= 1
    return first, last


def _drop_emoji(text: str) -> str:
    """Remove names of emoji; other words between colons, as in `std::vector::x`, stay."""
    if ":" not in text:
        return text
    return " ".join(_EMOJI.sub(lambda m: m[0] if _rendered(m[0]) == m[0] else " ", text).split())


def _render_emoji(text: str) -> str:
    return _rendered(text) if ":" in text else text


def _rendered(text: str) -> str:
    import emoji  # Imported here because its tables load slowly.

    return emoji.emojize(text)
