"""CLIP's byte-pair tokenizer: text to ids, ids to the 77-token window.

Owns cleaning, vocabulary and window. Equal to the published pipeline (OpenAI's CLIP with ftfy),
with two exceptions. A special token written out in a message stays plain text, so that a message
cannot end the prompt. And of thousands of combining marks in a row most are dropped, so that a
message cannot stall its reader. The vocabulary is the file that ships with open_clip_torch; that
package is located, never imported. Must not import torch.
"""

import gzip
import hashlib
import html
import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import ftfy
import numpy as np
import numpy.typing as npt
import regex
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from d2i.errors import ClusterError, ConfigError, DataError

START_ID = 49406
END_ID = 49407
"""Ends a prompt, and pads it."""
WINDOW_LENGTH = 77

_NUM_MERGES = 48894
_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
VOCABULARY_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
_INSTALL = "pip install open_clip_torch"

# CLIP's word pattern without its two special tokens.
_WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
_SPACE = regex.compile(r"\s+")
# ftfy sorts a run of combining marks, which takes time quadratic in its length.
_MANY_MARKS = regex.compile(r"(\p{M}{256})\p{M}++")


def encode(text: str) -> list[int]:
    """Turn text into CLIP ids: not truncated, without start and end.

    Returns:
        Ids in 0..49405, in reading order; empty for text that is blank after cleaning.

    Raises:
        ClusterError: If the vocabulary file is not installed.
        DataError: If the installed vocabulary is a different one.
    """
    words = _WORD.findall(clean(text))
    if not words:
        return []
    ids: list[int] = _tokenizer().encode(words, is_pretokenized=True, add_special_tokens=False).ids
    return ids


def window(
    ids: Sequence[int], keep: Literal["end", "start"] = "end", num_windows: int = 1
) -> npt.NDArray[np.uint16]:
    """Cut ids to CLIP's input: windows of start, up to 75 ids, end, padded with the end id.

    Args:
        ids: Output of `encode`.
        keep: The side that is kept if there are too many ids. `end` keeps the recent turns.
        num_windows: Number of windows that the ids are laid out over, in reading order.

    Returns:
        uint16 of shape (77 * num_windows,); a window without ids is that of ''.

    Raises:
        ConfigError: If `keep` or `num_windows` is out of range.
    """
    if keep not in ("end", "start"):
        raise ConfigError(f"window: keep={keep!r}, expected 'end' or 'start'; choose a side")
    if num_windows < 1:
        raise ConfigError(f"window: num_windows={num_windows}, expected 1 or more; use 1 for CLIP")
    size = WINDOW_LENGTH - 2
    room = size * num_windows
    kept = ids[-room:] if keep == "end" else ids[:room]
    rows = np.full((num_windows, WINDOW_LENGTH), END_ID, np.uint16)
    rows[:, 0] = START_ID
    for row in range(num_windows):
        piece = kept[row * size : (row + 1) * size]
        rows[row, 1 : 1 + len(piece)] = piece
    return rows.reshape(-1)


def split_at_window(
    text: str, keep: Literal["end", "start"] = "end", num_windows: int = 1
) -> tuple[str, str, int]:
    """Split a text where `window` cuts its ids.

    Args:
        text: Text as for `encode`.
        keep: As for `window`.
        num_windows: As for `window`.

    Returns:
        The text that the windows hold and the text that they cut off, both cleaned, and the number
        of ids that they hold. The cut may be inside a word.
    """
    cleaned = clean(text)
    words = list(_WORD.finditer(cleaned))
    pieces = [word[0] for word in words]
    encoded = _tokenizer().encode(pieces, is_pretokenized=True, add_special_tokens=False)
    num_ids, room = len(encoded.ids), (WINDOW_LENGTH - 2) * num_windows
    if num_ids <= room:
        return cleaned, "", num_ids

    def place(index: int, side: Literal[0, 1]) -> int:
        """Return where an id begins (0) or ends (1) in the cleaned text."""
        word, offsets = encoded.word_ids[index], encoded.offsets[index]
        assert word is not None  # as only special tokens are of no word
        return int(words[word].start() + offsets[side])

    if keep == "end":
        start = place(num_ids - room, 0)
        return cleaned[start:], cleaned[:start].rstrip(), room
    end = place(room - 1, 1)
    return cleaned[:end], cleaned[end:].lstrip(), room


def clean(text: str) -> str:
    """Fix encoding errors, unescape HTML (twice), collapse spaces, convert to lower case."""
    bounded = text if text.isascii() else _MANY_MARKS.sub(r"\1", text)
    fixed = html.unescape(html.unescape(ftfy.fix_text(bounded)))
    return _SPACE.sub(" ", fixed).strip().lower()


@cache
def _tokenizer() -> Tokenizer:
    merges = _read_merges(_vocabulary_path())
    alphabet = _alphabet()
    words = [*alphabet, *(f"{char}</w>" for char in alphabet), *map("".join, merges)]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    return tokenizer


def _alphabet() -> list[str]:
    """Return the characters that stand for the 256 bytes, in the vocabulary's order.

    Printable bytes come first and stand for themselves, the other 68 are mapped from 256 up.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(code) for code in [*printable, *range(256, 256 + 256 - len(printable))]]


def _read_merges(path: Path) -> list[tuple[str, str]]:
    packed = path.read_bytes()
    digest = hashlib.sha256(packed).hexdigest()
    if digest != VOCABULARY_SHA256:
        raise DataError(
            f"{path.name}: got sha256 {digest[:12]}, expected {VOCABULARY_SHA256[:12]}; "
            f"reinstall the vocabulary: {_INSTALL} --force-reinstall"
        )
    lines = gzip.decompress(packed).decode("utf-8").split("\n")
    pairs = (line.split() for line in lines[1 : _NUM_MERGES + 1])
    return [(left, right) for left, right in pairs]


def _vocabulary_path() -> Path:
    spec = importlib.util.find_spec("open_clip")
    for directory in (spec.submodule_search_locations or []) if spec else []:
        path = Path(directory) / _VOCABULARY
        if path.is_file():
            return path
    raise ClusterError(
        f"tokenizer: CLIP's vocabulary {_VOCABULARY} was not found, expected it in the package "
        f"open_clip; {_INSTALL}"
    )
