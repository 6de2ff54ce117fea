"""From a dialog to its instances: which pictures count, and which turns each one answers.

The paper leaves these points open; every one is an option here, with this project's reading as
its default, and the same for every corpus. Must not import torch.
"""

import itertools
import operator
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

from d2i.corpora.json_stream import MAX_RECORD_BYTES
from d2i.corpora.records import Dialog, Flaw, SharedImage
from d2i.dialog import Direction, ImageRef, Instance, Turn, key_prefix

# carpedm20/emoji's names: a letter first, or the medals' "1st_place_medal"; curly quotes occur.
_EMOJI = re.compile(r":(?:[^\W\d]|[123](?:st|nd|rd)_)[\w\u2019\u201c\u201d.&!()#*,-]*:")


@dataclass(frozen=True, kw_only=True)
class InstanceOptions:
    """How dialogs become instances, whatever corpus they come from."""

    direction: Direction = "answer"
    """`answer`: the context is what was said before the picture. `first`: the picture opens, and
    the context is what is said after it."""
    own_turn: Literal["default", "include", "exclude"] = "default"
    """Whether the text of the picture's own turn belongs to its context. By default it does where
    the picture answers, and not where it opens; in PhotoChat that turn has none."""
    images_in_turn: Literal["all", "first"] = "all"
    """Whether each picture of a turn is an instance, or the first alone whose name can be used."""
    repeated: Literal["default", "all", "unique"] = "default"
    """Keep every occurrence of a picture within the split, or its first one. By default every
    one, but in MMDialog's valid and test the first, as the paper's counts do."""
    earlier_images: str = ""
    """Text that stands in the context for each picture shared before this one, such as
    `[photo]`; empty as in the paper, which reads text only."""
    emoji: Literal["keep", "unicode", "drop"] = "keep"
    """Whether `:raising_hands:` stays as it is, becomes the character, or is left out."""

    descriptions: str | None = None
    """File of descriptions that `d2i corpus --describe` made, for pictures without one."""
    image_root: str | None = None
    """URL of the folder that holds the pictures, where it is another than the source."""

    max_record_bytes: ClassVar[int] = MAX_RECORD_BYTES
    """A longer record is passed over."""
    has_own_text: ClassVar[bool] = True
    """Whether anything is said in the turn of a picture that answers."""
    unique_splits: ClassVar[frozenset[str]] = frozenset()
    """Where `repeated` keeps a picture's first occurrence by default."""

    def split_by(self) -> tuple[dict[str, float], int] | None:
        """Return the shares and the seed that divide one unsplit file; None for a split corpus."""
        return None

    def is_unique(self, split: str) -> bool:
        """Say whether a picture is kept once a split."""
        return self.repeated == "unique" or (
            self.repeated == "default" and split in self.unique_splits
        )

    def image_id(self, ref: ImageRef) -> str:
        """Name the picture itself: equal wherever it occurs, in whichever split."""
        return ref.value[-1]

    def instances(self, dialog: Dialog, split: str, flaw: Flaw) -> Iterator[Instance]:
        """Make the instances of one dialog, in the order of its pictures.

        A picture with an empty context makes none, and is told to `flaw`.
        """
        turns = self._texts(dialog)
        prefix = key_prefix(split, dialog.id)
        first, last = _spoken_span(turns)
        begin, end = self._context_bounds
        for picture in self._chosen(dialog.images):
            turn, image = picture.turn, picture.image
            # One of the two ends moves with the picture, the other is that of the dialog.
            start = 0 if begin is None else turn + begin
            stop = len(turns) if end is None else turn + end
            if first >= stop or last < start:
                flaw("empty_context", f"turn {turn} image {image}: no text with it")
                continue
            context = turns[start:stop]
            if self.earlier_images:
                context = self._mark_images(context, start, picture, dialog.images)
            yield Instance(
                f"{prefix}{turn}-{image}",
                split,
                dialog.id,
                turn,
                image,
                context,
                picture.ref,
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
        """Return where a context begins and ends, counted from the picture's turn.

        None: where the dialog does.
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
        """Put a mark behind each turn of the context for every picture that came before."""
        marks: dict[int, str] = {}
        for other in images:
            if (other.turn, other.image) < (own.turn, own.image) or other.turn > own.turn:
                marks[other.turn] = f"{marks.get(other.turn, '')} {self.earlier_images}"
        return tuple(
            Turn(turn.speaker, f"{turn.text}{marks.get(index, '')}".strip())
            for index, turn in enumerate(context, start)
        )


def _spoken_span(turns: tuple[Turn, ...]) -> tuple[int, int]:
    """Return the indices of the first and the last turn that say something; (N, -1) for none."""
    first, last = 0, len(turns) - 1
    while first <= last and not turns[first].text.strip():
        first += 1
    if first > last:
        return len(turns), -1
    while not turns[last].text.strip():
        last -= 1
    return first, last


def _drop_emoji(text: str) -> str:
    """Leave out what names an emoji; other words between colons, as in `std::vector::x`, stay."""
    if ":" not in text:
        return text
    return " ".join(_EMOJI.sub(lambda m: m[0] if _rendered(m[0]) == m[0] else " ", text).split())


def _render_emoji(text: str) -> str:
    return _rendered(text) if ":" in text else text


def _rendered(text: str) -> str:
    import emoji  # Only whoever asks for it waits for its tables.

    return emoji.emojize(text)
