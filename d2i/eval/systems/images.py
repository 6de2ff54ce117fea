"""Images that were generated elsewhere, in files named by instance key."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from d2i.errors import DataError
from d2i.eval.prompts import Prompt
from d2i.eval.system import Generation, SystemContext
from d2i.images.decode import ImageRejectedError, decode_image
from d2i.images.image_files import read_image
from d2i.io import storage

_SUFFIXES = ("png", "jpg", "jpeg", "webp")
_MAX_BYTES = 1 << 28


def build(context: SystemContext) -> ImagesSystem:
    """List the images of `images:DIR`."""
    return ImagesSystem(context)


def is_image(name: str) -> bool:
    """Return whether a file name has the suffix of a supported image format."""
    return name.rpartition(".")[2].lower() in _SUFFIXES


class ImagesSystem:
    """Reads `DIR/{key}.png`, `.jpg`, `.jpeg` or `.webp`; a missing file is a failure."""

    def __init__(self, context: SystemContext) -> None:
        self._url, self._limits = context.spec.target, context.recipe.image
        names = storage.list_names(self._url)
        self._names = _by_key(self._url, filter(is_image, names), context.keys)
        _expect_some(self._url, names, self._names, context.keys)
        self.described = {"pictures": self._url}

    def generate(self, prompts: Sequence[Prompt]) -> list[Generation]:
        """Read the images of the prompts' keys."""
        return [self._read(prompt.key) for prompt in prompts]

    def _read(self, key: str) -> Generation:
        name = self._names.get(key)
        if name is None:
            return Generation(None, "missing_picture")
        try:
            data = read_image(self._url, name, _MAX_BYTES)
            decoded = decode_image(data, self._limits)
        except ImageRejectedError as err:
            return Generation(None, err.reason)
        width, height = decoded.image.size
        return Generation(np.asarray(decoded.image), source=f"{decoded.suffix} {width}x{height}")


def _by_key(url: str, names: Iterable[str], keys: Collection[str]) -> dict[str, str]:
    """Return the file name of each key that has one."""
    wanted, found = frozenset(keys), dict[str, str]()
    for name in names:
        key = name.rpartition(".")[0]
        if key not in wanted:
            continue
        if key in found:
            raise DataError(
                f"{url}: got two images for one key, {found[key]} and {name}; expected one; delete "
                "the other"
            )
        found[key] = name
    return found


def _expect_some(
    url: str, names: Sequence[str], found: Mapping[str, str], keys: Sequence[str]
) -> None:
    if found:
        return
    got = f"got {len(names)} files, such as {names[0]}" if names else "got an empty directory"
    raise DataError(
        f"{url}: no image is named by an instance key: {got}, expected files such as "
        f"{keys[0]}.png; name the images by the keys of the data set ('d2i inspect' lists them)"
    )
