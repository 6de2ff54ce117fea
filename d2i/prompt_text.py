"""The text encoder's prompt of a context: its turns selected, linearized, tokenized and windowed.

Combines `d2i.dialog` and `d2i.tokenize` according to a recipe, for every stage that reads a
conversation. Must not import torch.
"""

import bisect
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from d2i.config import TextConfig
from d2i.dialog import Turn, is_written, linearize
from d2i.tokenize import WINDOW_LENGTH, encode, window


def context_text(turns: Sequence[Turn], config: TextConfig) -> str:
    """Linearize a context to one line, oldest turn first.

    Drops whole turns on the side that `config.keep` does not keep: those over `max_turns`, and,
    with `cut="turn"`, those that do not fit the window. One turn always stays.
    """
    counted = [index for index, turn in enumerate(turns) if is_written(turn, config.empty_turns)]
    if not counted:
        return ""

    def line(num_turns: int) -> str:
        kept = (
            turns[counted[-num_turns] :]
            if config.keep == "end"
            else turns[: counted[num_turns - 1] + 1]
        )
        return linearize(
            kept,
            config.strategy,
            empty_turns=config.empty_turns,
            speaker_runs=config.speaker_runs,
        )

    num_turns = min(len(counted), config.max_turns or len(counted))
    if config.cut == "turn":
        room = (WINDOW_LENGTH - 2) * config.num_windows
        choices = range(1, num_turns + 1)
        fitting = bisect.bisect_right(choices, room, key=lambda num: len(encode(line(num))))
        num_turns = max(1, fitting)
    return line(num_turns)


def text_tokens(text: str, config: TextConfig) -> npt.NDArray[np.uint16]:
    """Tokenize a line and cut it to the windows of a recipe: uint16 (77 W,)."""
    return window(encode(text), keep=config.keep, num_windows=config.num_windows)


def context_tokens(turns: Sequence[Turn], config: TextConfig) -> npt.NDArray[np.uint16]:
    """Linearize and tokenize a context: uint16 (77 W,)."""
    return text_tokens(context_text(turns, config), config)
