"""Near-duplicate detection: a perceptual hash of images, and an index that finds near hashes.

The hash is the sign pattern of the lowest frequencies of the brightness ("pHash" in the
literature), 64 bits; rescaling and recompression change only a few of them. Coarse colours must
agree as well, since brightness alone confuses a red ball with a green one.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MAX_DISTANCE = 4
"""Largest number of bits in which the hashes of near-duplicates differ (our default)."""
MAX_COLOUR_DISTANCE = 24
"""Largest difference of their coarse colours, in levels of 255 (our default)."""

_SIDE, _KEPT, _COLOUR_SIDE = 32, 8, 4
_MIN_CONTRAST = 4.0
# Two hashes that differ in at most 4 bits are equal in at least one of 5 bands.
_BANDS = ((0, 13), (13, 13), (26, 13), (39, 13), (52, 12))


@dataclass(frozen=True)
class PerceptualHash:
    """Perceptual hash of an image: 64 bits of structure, and uint8 (4, 4, 3) coarse colours."""

    structure: int
    colours: NDArray[np.uint8]


def perceptual_hash_of(image: Image.Image) -> PerceptualHash | None:
    """Return the hash of an RGB image; None if it is so plain that it looks like any other."""
    grey = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    brightness = np.asarray(grey, np.float64)
    if brightness.std() < _MIN_CONTRAST:
        return None
    waves = _cosines()
    low = (waves @ brightness @ waves.T)[:_KEPT, :_KEPT].ravel()
    # The mean brightness, at 0, says nothing about structure: its bit is always unset.
    bits = low > np.median(low[1:])
    bits[0] = False
    structure = int.from_bytes(np.packbits(bits).tobytes(), "big")
    small = image.resize((_COLOUR_SIDE, _COLOUR_SIDE), Image.Resampling.BOX)
    return PerceptualHash(structure, np.asarray(small, np.uint8))


class HashIndex:
    """Finds the nearest of the hashes that were added."""

    def __init__(self) -> None:
        self._hashes: list[tuple[str, PerceptualHash]] = []
        self._bands: list[defaultdict[int, list[int]]] = [defaultdict(list) for _ in _BANDS]

    def __len__(self) -> int:
        """Return the number of hashes."""
        return len(self._hashes)

    def add(self, name: str, image_hash: PerceptualHash) -> None:
        """Add a hash, under the name of its image."""
        for band, part in zip(self._bands, _parts(image_hash.structure), strict=True):
            band[part].append(len(self._hashes))
        self._hashes.append((name, image_hash))

    def nearest(self, image_hash: PerceptualHash) -> tuple[str, int] | None:
        """Return the name of the nearest hash and its distance in bits, or None if none is near."""
        found: tuple[int, int] | None = None
        for position in self._candidates(image_hash):
            other = self._hashes[position][1]
            distance = (other.structure ^ image_hash.structure).bit_count()
            if distance <= MAX_DISTANCE and _colours_agree(other, image_hash):
                found = min(found or (distance, position), (distance, position))
        return None if found is None else (self._hashes[found[1]][0], found[0])

    def _candidates(self, image_hash: PerceptualHash) -> set[int]:
        parts = zip(self._bands, _parts(image_hash.structure), strict=True)
        return {position for band, part in parts for position in band.get(part, ())}


def _parts(structure: int) -> list[int]:
    return [structure >> shift & ((1 << width) - 1) for shift, width in _BANDS]


def _colours_agree(one: PerceptualHash, other: PerceptualHash) -> bool:
    difference: Any = np.abs(one.colours.astype(np.int16) - other.colours.astype(np.int16))
    return bool(difference.max() <= MAX_COLOUR_DISTANCE)


def _cosines() -> NDArray[np.float64]:
    """Return the type-II discrete cosine transform as a matrix (32, 32), not normalised."""
    positions = np.arange(_SIDE)
    return np.cos(np.pi * positions[:, None] * (2 * positions + 1) / (2 * _SIDE))
