"""Survey of a corpus: its content, the lengths of its contexts, and the effect of each option.

One pass over every split counts instances under every option exactly. Token lengths are measured
on a sample of each split, chosen by key, as tokenizing takes a hundred times as long as reading.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from msgspec import Struct

from d2i.config import DialogConfig, TextConfig
from d2i.corpora import Corpus, Dialog, build_corpus, read_dialogs
from d2i.corpora.compact_set import CompactHashSet
from d2i.corpora.records import IssueCounter, Reason, ReportIssue
from d2i.dialog import Instance, join_key, key_order_hash, key_prefix
from d2i.prompt_text import context_text
from d2i.tokenize import WINDOW_LENGTH, encode

_BINS_PER_WINDOW = 5
_NUM_BINS = 20

_MAX_SAMPLE_CHARS = 32 << 20
"""A sample is reduced if its dialogs are longer than this in total."""
_TURN_CHARS = 64
"""Overhead of a turn beside its text, in characters."""

_CORPUS_OPTIONS: dict[str, tuple[str, ...]] = {
    "direction": ("answer", "first"),
    "own_turn": ("include", "exclude"),
    "images_in_turn": ("all", "first"),
    "repeated": ("all", "unique"),
    "earlier_images": ("", "[photo]"),
    "emoji": ("keep", "unicode", "drop"),
}
_TEXT_OPTIONS: dict[str, tuple[str | int, ...]] = {
    "strategy": ("hash", "space", "special", "letters"),
    "empty_turns": ("drop", "keep"),
    "speaker_runs": ("keep", "merge"),
    "max_turns": (1, 3),
    "keep": ("end", "start"),
    "cut": ("token", "turn"),
    "num_windows": (1, 2),
}


class Lengths(Struct):
    """Token lengths of sampled contexts, before any is cut by token.

    `counts[i]` is the number of contexts with over `i * bin_width` and up to
    `(i + 1) * bin_width` tokens; the first bin includes 0, the last one is open above. `room` is
    the number of tokens that fit, `share_over` the share of contexts with more.
    """

    num_sampled: int
    room: int
    bin_width: int
    counts: list[int]
    mean: float | None
    longest: int
    share_over: float | None


class VariantSurvey(Struct):
    """Effect of changing one option, all else as set; `num_empty` images have no context."""

    option: str
    value: str | int
    num_instances: int
    num_empty: int
    mean_tokens: float | None
    share_over: float | None


class SplitSurvey(Struct):
    """Content of one split. Occurrences count an image each time it is shared.

    `first_problems` has, for each reason, where the first case is, and what was found and expected.
    `most_occurrences` is the count of the image that is shared most: all of them are in one shard.
    """

    num_dialogs: int
    num_dialogs_with_images: int
    num_turns: int
    num_occurrences: int
    num_images: int
    most_occurrences: int
    num_instances: int
    problems: dict[str, int]
    first_problems: dict[str, dict[str, str]]
    lengths: Lengths
    variants: list[VariantSurvey]


def survey_split(
    name: str,
    source: str,
    split: str,
    config: DialogConfig,
    *,
    num_sampled: int,
    on_dialog: Callable[[], None],
) -> SplitSurvey:
    """Survey one split; broken records are counted, however many there are.

    Args:
        name: `mmdialog`, `photochat` or `jsonl`.
        source: Path or fsspec URL of the corpus.
        split: `train`, `valid` or `test`.
        config: The options that count as set.
        num_sampled: Number of image occurrences whose token lengths are measured.
        on_dialog: Called for every dialog read.

    Raises:
        ConfigError: If the corpus or an option is unknown.
        DataError: If the source holds no such split.
    """
    as_set, *others = _variants(name, config)
    # Text settings change no count, so one counter serves all of them.
    counters = {variant.corpus: _Counter(variant.corpus, split) for variant in (as_set, *others)}
    problems = IssueCounter()
    dialogs, report_issue = read_dialogs(
        as_set.corpus, source, split, on_problem=problems.add, max_broken=1.0
    )
    counts, images, sample = Counter[str](), Counter[int](), _Sample(num_sampled)
    for dialog in dialogs:
        on_dialog()
        counts["dialogs"] += 1
        counts["turns"] += len(dialog.turns)
        counts["occurrences"] += len(dialog.images)
        counts["with_images"] += bool(dialog.images)
        images.update(hash(as_set.corpus.image_id(shared.ref)) for shared in dialog.images)
        sample.offer(dialog, split)
        for corpus, counter in counters.items():
            counter.take(dialog, report_issue if corpus == as_set.corpus else _ignore_issue)
    return SplitSurvey(
        num_dialogs=counts["dialogs"],
        num_dialogs_with_images=counts["with_images"],
        num_turns=counts["turns"],
        num_occurrences=counts["occurrences"],
        num_images=len(images),
        most_occurrences=max(images.values(), default=0),
        num_instances=counters[as_set.corpus].num_instances,
        problems=problems.counts,
        first_problems=problems.first,
        lengths=_lengths(as_set, sample.token_counts(as_set, split)),
        variants=[
            _variant_survey(variant, counters[variant.corpus], sample.token_counts(variant, split))
            for variant in others
        ],
    )


@dataclass(frozen=True)
class _Variant:
    """The options as set, except for one."""

    option: str
    value: str | int
    corpus: Corpus
    text: TextConfig

    @property
    def room(self) -> int:
        return (WINDOW_LENGTH - 2) * self.text.num_windows


def _variants(name: str, config: DialogConfig) -> list[_Variant]:
    """Return the options as set, then each with one of them changed."""
    options = config.corpus.options()
    corpus = build_corpus(name, options)
    variants = [_Variant("", "", corpus, config.text)]
    for option, values in _CORPUS_OPTIONS.items():
        now = getattr(corpus, option)
        # If the option is `default`, both other values are shown, though one changes nothing.
        for value in (value for value in values if value != now):
            changed = build_corpus(name, options | {option: value})
            variants.append(_Variant(option, value, changed, config.text))
    for option, choices in _TEXT_OPTIONS.items():
        for choice in (choice for choice in choices if choice != getattr(config.text, option)):
            text = config.text.model_copy(update={option: choice})
            variants.append(_Variant(f"text.{option}", choice, corpus, text))
    return variants


class _Counter:
    """Counts the instances of one split under the options of one corpus."""

    def __init__(self, corpus: Corpus, split: str) -> None:
        self.num_instances = 0
        self.num_empty = 0
        self._corpus = corpus
        self._split = split
        self._seen = CompactHashSet() if corpus.is_unique(split) else None

    def take(self, dialog: Dialog, report_issue: ReportIssue) -> None:
        """Count the instances of one dialog."""

        def note(reason: Reason, detail: str) -> None:
            self.num_empty += reason == "empty_context"
            report_issue(reason, detail)

        instances = list(self._corpus.instances(dialog, self._split, note))
        if self._seen is not None:
            instances = _first_seen(instances, self._corpus, self._seen)
        self.num_instances += len(instances)


def _first_seen(instances: list[Instance], corpus: Corpus, seen: CompactHashSet) -> list[Instance]:
    """Return the instances whose image was not seen before, and add their images to `seen`."""
    kept = []
    for instance in instances:
        image = hash(corpus.image_id(instance.image_ref))
        if image not in seen:
            seen.add(image)
            kept.append(instance)
    return kept


class _Sample:
    """The image occurrences that come first in the seeded order of keys, each with its dialog.

    Occurrences, not instances, because the options decide which of them are instances.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._heap: list[tuple[int, str, Dialog]] = []
        self._num_chars = 0

    def offer(self, dialog: Dialog, split: str) -> None:
        """Add the occurrences of a dialog that come early enough."""
        prefix = key_prefix(split, dialog.id)
        for shared in dialog.images:
            key = join_key(prefix, shared.turn, shared.image)
            entry = (-key_order_hash(key, 0), key, dialog)
            if len(self._heap) < self._size or (self._heap and entry > self._heap[0]):
                self._take(entry)

    def _take(self, entry: tuple[int, str, Dialog]) -> None:
        heapq.heappush(self._heap, entry)
        self._num_chars += _num_chars(entry[2])
        if len(self._heap) > self._size:
            self._drop_last()
        while self._num_chars > _MAX_SAMPLE_CHARS:
            self._drop_last()
            self._size = len(self._heap)

    def _drop_last(self) -> None:
        self._num_chars -= _num_chars(heapq.heappop(self._heap)[2])

    def token_counts(self, variant: _Variant, split: str) -> list[int]:
        """Return the context length, in tokens, of each occurrence that is a variant's instance."""
        keys = {key for _, key, _ in self._heap}
        # Several occurrences of one dialog may be sampled: its instances are made once.
        dialogs = {dialog.id: dialog for _, _, dialog in self._heap}
        return [
            len(encode(context_text(instance.context, variant.text)))
            for dialog in dialogs.values()
            for instance in variant.corpus.instances(dialog, split, _ignore_issue)
            if instance.key in keys
        ]


def _num_chars(dialog: Dialog) -> int:
    return sum(len(turn.text) + _TURN_CHARS for turn in dialog.turns)


def _ignore_issue(reason: Reason, detail: str) -> None:
    """Drop an issue: those of the options as set are reported once, when the dialog is read."""


def _lengths(variant: _Variant, token_counts: list[int]) -> Lengths:
    width = variant.room // _BINS_PER_WINDOW
    counts = [0] * _NUM_BINS
    for count in token_counts:
        counts[min(max(count - 1, 0) // width, _NUM_BINS - 1)] += 1
    return Lengths(
        num_sampled=len(token_counts),
        room=variant.room,
        bin_width=width,
        counts=counts,
        mean=_mean(token_counts),
        longest=max(token_counts, default=0),
        share_over=_share_over(token_counts, variant.room),
    )


def _variant_survey(variant: _Variant, counter: _Counter, token_counts: list[int]) -> VariantSurvey:
    return VariantSurvey(
        option=variant.option,
        value=variant.value,
        num_instances=counter.num_instances,
        num_empty=counter.num_empty,
        mean_tokens=_mean(token_counts),
        share_over=_share_over(token_counts, variant.room),
    )


def _mean(token_counts: list[int]) -> float | None:
    return sum(token_counts) / len(token_counts) if token_counts else None


def _share_over(token_counts: list[int], room: int) -> float | None:
    if not token_counts:
        return None
    return sum(count > room for count in token_counts) / len(token_counts)
