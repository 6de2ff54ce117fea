"""One unsplit file of dialogs, divided by shares: seeded, and no picture is in two splits.

Dialogs that show the same picture stay together, so that no training has seen a picture of the
test. Must not import torch.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from d2i.corpora.records import Dialog
from d2i.corpora.splits import SPLITS
from d2i.dialog import ImageRef, key_order_hash
from d2i.errors import ConfigError

_NAMES = tuple(SPLITS)
_TOLERANCE = 1e-6


def parse_shares(text: str) -> dict[str, float]:
    """Read the shares of train, valid and test, as `0.8,0.1,0.1`.

    Raises:
        ConfigError: If they are not three numbers from 0 whose sum is 1.
    """
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    is_sound = len(shares) == len(_NAMES) and all(share >= 0 for share in shares)
    if not is_sound or abs(sum(shares) - 1) > _TOLERANCE:
        raise ConfigError(
            f"split: got {text!r}, expected the shares of train, valid and test, whose sum is 1; "
            "write 0.8,0.1,0.1"
        )
    return dict(zip(_NAMES, shares, strict=True))


class DialogSplits:
    """Which split each dialog of a file belongs to.

    Args:
        dialogs: All of them.
        image_id: Names a picture: equal wherever it occurs.
        shares: Of the dialogs that show a picture, by split; their sum is 1.
        seed: Decides which dialogs go where.
    """

    def __init__(
        self,
        dialogs: Iterable[Dialog],
        image_id: Callable[[ImageRef], str],
        shares: dict[str, float],
        seed: int,
    ) -> None:
        self._seed = seed
        ids, owners, images = array("Q"), array("Q"), array("q")
        for dialog in dialogs:
            if not dialog.images:
                continue
            for image in dialog.images:
                owners.append(len(ids))
                images.append(hash(image_id(image.ref)))
            ids.append(key_order_hash(dialog.id, seed))
        hashes = np.array(ids, np.uint64)
        groups = _groups(len(ids), np.array(owners, np.int64), np.array(images, np.int64))
        places = _place(hashes, groups, [shares[name] for name in _NAMES])
        order = np.argsort(hashes)
        self._hashes, self._places = hashes[order], places[order]

    def split_of(self, dialog: Dialog) -> str:
        """Return the split of a dialog; one without a picture, which gives none, is of train."""
        if not dialog.images:
            return _NAMES[0]
        place = np.searchsorted(self._hashes, np.uint64(key_order_hash(dialog.id, self._seed)))
        return _NAMES[int(self._places[place])]


def _groups(
    num_dialogs: int, owners: NDArray[np.int64], images: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Number the groups of dialogs that share pictures: the first dialog of each, by dialog."""
    first = list(range(num_dialogs))

    def find(dialog: int) -> int:
        while first[dialog] != dialog:
            first[dialog] = first[first[dialog]]
            dialog = first[dialog]
        return dialog

    order = np.argsort(images, kind="stable")
    is_shared = np.flatnonzero(images[order][1:] == images[order][:-1])
    for one, other in zip(owners[order][is_shared], owners[order][is_shared + 1], strict=True):
        ends = sorted((find(int(one)), find(int(other))))
        first[ends[1]] = ends[0]
    return np.array([find(dialog) for dialog in range(num_dialogs)], np.int64)


def _place(
    hashes: NDArray[np.uint64], groups: NDArray[np.int64], shares: list[float]
) -> NDArray[np.uint8]:
    """Fill the splits in their order, by large groups first, then in the order of hashes.

    So a file that has grown a little moves few dialogs.
    """
    _, members, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    least = np.full(len(sizes), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(least, members, hashes)
    lacking = [share * len(hashes) for share in shares]
    places = np.zeros(len(sizes), np.uint8)
    for group in np.lexsort((least, -sizes)):
        size = int(sizes[group])
        room = (place for place, left in enumerate(lacking) if left >= size / 2)
        place = next(room, lacking.index(max(lacking)))
        lacking[place] -= size
        places[group] = place
    return places[members]
