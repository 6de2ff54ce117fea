"""Seeded division of one unsplit file of dialogs into splits, with no image in two of them.

Dialogs that show the same image stay together, so that training sees no image of the test split.
Must not import torch.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from d2i.corpora.records import Dialog
from d2i.dialog import SPLITS, ImageRef, key_order_hash
from d2i.errors import ConfigError

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
    is_sound = len(shares) == len(SPLITS) and all(share >= 0 for share in shares)
    if not is_sound or abs(sum(shares) - 1) > _TOLERANCE:
        raise ConfigError(
            f"split: got {text!r}, expected the shares of train, valid and test, whose sum is 1; "
            "write 0.8,0.1,0.1"
        )
    return dict(zip(SPLITS, shares, strict=True))


class DialogSplits:
    """Assignment of the dialogs of a file to splits.

    Args:
        dialogs: All dialogs of the file.
        image_id: Returns the identity of an image: equal wherever it occurs.
        shares: Share of the dialogs with an image, by split; their sum is 1.
        seed: Decides which dialog goes to which split.
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
        assigned = _assign(hashes, groups, [shares[name] for name in SPLITS])
        order = np.argsort(hashes)
        self._hashes, self._assigned = hashes[order], assigned[order]

    def split_of(self, dialog: Dialog) -> str:
        """Return the split of a dialog; one without images gives no instance and is in train."""
        if not dialog.images:
            return SPLITS[0]
        position = np.searchsorted(self._hashes, np.uint64(key_order_hash(dialog.id, self._seed)))
        return SPLITS[int(self._assigned[position])]


def _groups(
    num_dialogs: int, owners: NDArray[np.int64], images: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the group of each dialog: the first dialog that it shares images with, or itself.

    Sharing is transitive.
    """
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


def _assign(
    hashes: NDArray[np.uint64], groups: NDArray[np.int64], shares: list[float]
) -> NDArray[np.uint8]:
    """Fill the splits in their order, with large groups first, then in the order of hashes.

    A file that grows a little thus moves few dialogs.
    """
    _, members, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    least = np.full(len(sizes), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(least, members, hashes)
    lacking = [share * len(hashes) for share in shares]
    assigned = np.zeros(len(sizes), np.uint8)
    for group in np.lexsort((least, -sizes)):
        size = int(sizes[group])
        room = (position for position, left in enumerate(lacking) if left >= size / 2)
        position = next(room, lacking.index(max(lacking)))
        lacking[position] -= size
        assigned[group] = position
    return assigned[members]
