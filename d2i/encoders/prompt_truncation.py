"""Truncation of text for pipelines: the length and the side that each text encoder reads.

Published pipelines truncate a line at its end, which drops the newest turns of a dialog. Here they
truncate on the side that `text.keep` gives up, each encoder at its own length.
"""

from __future__ import annotations

import bisect
import contextlib
import inspect
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from d2i.errors import ConfigError

Keep = Literal["end", "start"]
Row = list[int]
"""The token ids of one text as an encoder gets them, without the padding that a mask marks."""

# More words than any encoder takes.
_LONG = "a " * 2048
_SHORT = ("a", "b")
_WRONG = (
    *(ValueError, TypeError, RuntimeError, KeyError, AttributeError, IndexError),
    # A tokenizer that lacks its files has no greatest length.
    OverflowError,
)


class _Encoded(Exception):
    """Raised to end a call once all text encoders have run."""


@dataclass(frozen=True)
class TextWindow:
    """The text window of one encoder.

    Args:
        tokens: Most token ids it gets, with special tokens and the pipeline's own words.
        dialog_tokens: Most ids of a dialog among them.
        has_template: True if the pipeline puts words of its own around a dialog.
    """

    tokens: int
    dialog_tokens: int
    has_template: bool


class PromptTruncation:
    """Makes a pipeline's text encoders read as much of a line as fits, on the side to keep.

    Where a tokenizer gets the line alone, it truncates the line itself, between tokens. Where a
    pipeline puts words of its own around the line, such as a chat template, the line is truncated
    beforehand, so that these words stay whole. A special token written out in a message stays
    plain text.

    Args:
        pipeline: A diffusers pipeline, on its device; sets the truncation side of its tokenizers.
        arguments: Arguments of its call beside the prompt, such as `max_sequence_length`.
        keep: The side to keep of a line that is too long.

    Attributes:
        keep: The side that stays.
        windows: The text window of each encoder, by the name of the pipeline's part.

    Raises:
        ConfigError: If the pipeline takes no prompt, does not generate from text alone, refuses an
            argument, or has no text encoder that can be identified.
    """

    def __init__(self, pipeline: Any, arguments: dict[str, Any], keep: Keep) -> None:
        _expect_prompt(pipeline, arguments)
        self.keep = keep
        self._tokenizers = text_tokenizers(pipeline)
        for tokenizer in self._tokenizers.values():
            tokenizer.truncation_side = "left" if keep == "end" else "right"
        # A pipeline's warning about the end that it truncates is wrong now, and long.
        logging.getLogger(type(pipeline).__module__).setLevel(logging.ERROR)
        self.windows = _find_windows(pipeline, arguments, self._tokenizers)
        self._special = spelling_pattern(
            token
            for tokenizer in self._tokenizers.values()
            for token in special_tokens(tokenizer).values()
        )

    def read(self, line: str) -> str:
        """Return the text to pass to the pipeline for a line."""
        line = self._plain(line)
        for name, window in self.windows.items():
            if window.has_template:
                line = cut_line(line, self._fits(name, window.dialog_tokens), self.keep)
        return line

    def split(self, line: str) -> tuple[str, int, str]:
        """Split a line where the encoder with the longest window cuts it.

        Returns:
            The text that it is given, the number of its tokens, and the text that is cut off.
        """
        name, window = max(self.windows.items(), key=lambda item: item[1].dialog_tokens)
        plain, room = self._plain(line), window.dialog_tokens
        if window.has_template:
            kept = self.read(line)
            num_tokens = len(self._tokenizers[name](kept, add_special_tokens=False).input_ids)
            cut = plain.removesuffix(kept) if self.keep == "end" else plain.removeprefix(kept)
            return kept, num_tokens, cut.strip()
        encoded = self._tokenizers[name](
            plain, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        places = encoded.offset_mapping
        if len(places) <= room:
            return plain, len(places), ""
        if self.keep == "end":
            start = places[len(places) - room][0]
            return plain[start:], room, plain[:start].strip()
        end = places[room - 1][1]
        return plain[:end], room, plain[end:].strip()

    def _plain(self, line: str) -> str:
        return self._special.sub(lambda found: f"{found[0][0]} {found[0][1:]}", line)

    def _fits(self, name: str, room: int) -> Callable[[str], bool]:
        def fits(text: str) -> bool:
            ids = self._tokenizers[name](text, add_special_tokens=False, verbose=False).input_ids
            return len(ids) <= room

        return fits


def cut_line(line: str, fits: Callable[[str], bool], keep: Keep) -> str:
    """Drop the fewest words on the side given up; of a word that alone is too long, letters.

    Args:
        line: Words separated by spaces.
        fits: Returns True if a text is short enough; every shorter part of it fits as well.
        keep: The side that stays.
    """
    if fits(line):
        return line
    words = [found.span() for found in re.finditer(r"\S+", line)]
    if keep == "end":
        places = [start for start, _ in words] + [*range(words[-1][0] + 1, len(line) + 1)]
        return line[places[_first(places, lambda place: fits(line[place:]))] :]
    places = [end for _, end in reversed(words)] + [*range(words[0][1] - 1, -1, -1)]
    return line[: places[_first(places, lambda place: fits(line[:place]))]]


def _first(places: list[int], is_good: Callable[[int], bool]) -> int:
    """Return the index of the first good position, or of the last position."""
    return min(bisect.bisect_left(places, True, key=is_good), len(places) - 1)


def _expect_prompt(pipeline: Any, arguments: dict[str, Any]) -> None:
    taken = inspect.signature(pipeline.__call__).parameters
    kind = type(pipeline).__name__
    if "prompt" not in taken:
        raise ConfigError(
            f"{kind} takes no prompt; expected a text-to-image pipeline; pass another --system "
            "diffusers:PATH"
        )
    # Some pipelines take any name, and silently ignore those that they do not know.
    if unknown := sorted(arguments.keys() - taken.keys()):
        raise ConfigError(
            f"sample.pipeline: {kind} takes no {', '.join(unknown)}; expected arguments of its "
            "call, such as num_inference_steps; correct or remove the name"
        )


def text_tokenizers(pipeline: Any) -> dict[str, Any]:
    """Return the tokenizer of each text encoder, by the encoder's name.

    Args:
        pipeline: A diffusers pipeline.
    """
    parts = pipeline.components
    found = {}
    for name, module in parts.items():
        tokenizer = parts.get(name.replace("text_encoder", "tokenizer"))
        if "text_encoder" in name and isinstance(module, nn.Module) and tokenizer is not None:
            # A processor of text and images contains its tokenizer.
            found[name] = getattr(tokenizer, "tokenizer", tokenizer)
    return found


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Return the special tokens that a message could spell, by their ids.

    Args:
        tokenizer: A tokenizer of transformers.
    """
    return {
        index: str(token)
        for index, token in tokenizer.added_tokens_decoder.items()
        # Longer than one character, because SD 2's padding is an exclamation mark.
        if token.special and len(str(token)) > 1
    }


def spelling_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern of spelled tokens, in any case as some pipelines lowercase text later.

    Args:
        tokens: The tokens' own spelling.
    """
    longest_first = sorted(set(tokens), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)", re.IGNORECASE)


def _find_windows(
    pipeline: Any, arguments: dict[str, Any], tokenizers: dict[str, Any]
) -> dict[str, TextWindow]:
    """Find the text windows by running the pipeline on a long text and two short ones."""
    long, first, second = (
        read_rows(pipeline, arguments, text, tokenizers) for text in (_LONG, *_SHORT)
    )
    default = inspect.signature(pipeline.__call__).parameters.get("max_sequence_length")
    kept = arguments.get("max_sequence_length", default.default if default else None)
    found = {}
    for name, rows in long.items():
        special = frozenset(tokenizers[name].all_special_ids)
        # The longest row is the prompt: others, such as a negative prompt, are short.
        index = max(range(len(rows)), key=lambda row: _num_plain(rows[row], special))
        found[name] = _window(rows[index], first[name][index], second[name][index], special, kept)
    if not found:
        raise ConfigError(
            f"{type(pipeline).__name__} has no components named text_encoder and tokenizer, so its "
            "text window is unknown; generate images with it outside d2i, and evaluate them as "
            "--system images:DIR"
        )
    return found


def _window(
    long: Row, first: Row, second: Row, special: frozenset[int], kept: int | None
) -> TextWindow:
    before = _num_common(first, second)
    after = _num_common(first[before:][::-1], second[before:][::-1])
    around = [*first[:before], *(first[-after:] if after else ())]
    if not _num_plain(around, special):
        return TextWindow(len(long), _num_plain(long, special), has_template=False)
    room = len(long) - before - after
    # Some encode their own first words beyond `max_sequence_length`, and drop them afterwards.
    room = min(room, kept - after) if isinstance(kept, int) else room
    return TextWindow(len(long), room, has_template=True)


def _num_plain(row: Row, special: frozenset[int]) -> int:
    return sum(token not in special for token in row)


def _num_common(first: Row, second: Row) -> int:
    """Return the length of the common prefix of two rows."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (one, other) in pairs if one != other), min(len(first), len(second)))


@torch.inference_mode()
def read_rows(
    pipeline: Any, arguments: dict[str, Any], text: str, encoders: dict[str, Any]
) -> dict[str, list[Row]]:
    """Return the rows that each text encoder gets for a prompt, without generating an image.

    Args:
        pipeline: A diffusers pipeline, of which text encoders alone run.
        arguments: Arguments of its call beside the prompt.
        text: The prompt.
        encoders: The names of its text encoders, as keys.

    Raises:
        ConfigError: If the pipeline cannot generate from a prompt.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    with _quiet("transformers.tokenization_utils_base"), _watched(pipeline, encoders) as rows:
        try:
            pipeline(prompt=[text], generator=[generator], output_type="np", **arguments)
        except _Encoded:
            pass
        except _WRONG as err:
            reason = (str(err).strip() or type(err).__name__).splitlines()[0][:200]
            raise ConfigError(
                f"{type(pipeline).__name__} cannot generate from a prompt: {reason}; expected a "
                "text-to-image pipeline and arguments that it takes; check sample.pipeline"
            ) from err
    return rows


def first_rows(encoder: nn.Module, call: Callable[[], object]) -> list[Row]:
    """Return the rows that a text encoder gets first in a call, which ends before it runs.

    Args:
        encoder: The text encoder.
        call: Encodes texts.
    """
    rows: list[Row] = []

    def collect(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        rows.extend(_rows(args, options))
        raise _Encoded

    hook = encoder.register_forward_pre_hook(collect, with_kwargs=True)
    try:
        with contextlib.suppress(_Encoded):
            call()
    finally:
        hook.remove()
    return rows


@contextlib.contextmanager
def _quiet(logger_name: str) -> Iterator[None]:
    """Silence a library's one-time warning about a text that is too long on purpose."""
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _watched(pipeline: Any, encoders: dict[str, Any]) -> Iterator[dict[str, list[Row]]]:
    """Collect the inputs of text encoders; end the call when another network runs."""
    rows: dict[str, list[Row]] = {}

    def stop(*_: Any) -> None:
        raise _Encoded

    def collect(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _, args, options: rows.setdefault(name, []).extend(_rows(args, options))

    with contextlib.ExitStack() as hooks:
        for name, module in pipeline.components.items():
            if not isinstance(module, nn.Module):
                continue
            hook = (
                module.register_forward_pre_hook(collect(name), with_kwargs=True)
                if name in encoders
                else module.register_forward_pre_hook(stop)
            )
            hooks.callback(hook.remove)
        yield rows


def _rows(args: tuple[Any, ...], options: dict[str, Any]) -> list[Row]:
    ids = options["input_ids"] if "input_ids" in options else args[0]
    mask = options.get("attention_mask")
    if mask is None or mask.shape != ids.shape:
        return list(ids.tolist())
    return [row[shown].tolist() for row, shown in zip(ids, mask.bool(), strict=True)]
