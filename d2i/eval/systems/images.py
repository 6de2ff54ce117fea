"""Pictures that were made elsewhere, in files named by instance key."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from d2i import storage
from d2i.errors import DataError
from d2i.eval.prompts import Prompt
from d2i.eval.system import Drawing, SystemContext
from d2i.picture_files import read_picture
from d2i.pictures import RefusedPictureError, decode_picture

_SUFFIXES = {"png": "png", "jpg": "jpg", "jpeg": "jpg", "webp": "webp"}
_MAX_BYTES = 1 << 28


def build(context: SystemContext) -> ImagesSystem:
    """List the pictures of `images:DIR`."""
    return ImagesSystem(context)


class ImagesSystem:
    """Reads `DIR/{key}.png`, `.jpg` or `.webp`; what is not there is a failure, never replaced."""

    def __init__(self, context: SystemContext) -> None:
        self._url, self._limits = context.spec.target, context.recipe.image
        names = storage.list_names(self._url)
        self._names = {
            stem: name
            for name in names
            for stem, _, suffix in [name.rpartition(".")]
            if suffix.lower() in _SUFFIXES
        }
        _expect_some(self._url, names, self._names.keys(), context.keys)
        self.described = {"pictures": self._url}

    def draw(self, prompts: Sequence[Prompt]) -> list[Drawing]:
        """Read the pictures of the prompts' keys."""
        return [self._read(prompt.key) for prompt in prompts]

    def _read(self, key: str) -> Drawing:
        name = self._names.get(key)
        if name is None:
            return Drawing(None, "missing_picture")
        try:
            data = read_picture(self._url, name, _MAX_BYTES)
            picture = decode_picture(data, self._limits)
        except RefusedPictureError as err:
            return Drawing(None, err.reason)
        width, height = picture.image.size
        return Drawing(np.asarray(picture.image), source=f"{picture.suffix} {width}x{height}")


def _expect_some(url: str, names: Sequence[str], stems: object, keys: Sequence[str]) -> None:
    if any(key in stems for key in keys):  # type: ignore[operator]
        return
    got = f"got {len(names)} files, such as {names[0]}" if names else "got an empty folder"
    raise DataError(
        f"{url}: no picture is named by an instance key: {got}, expected files such as "
        f"{keys[0]}.png; name the pictures by the keys of the data set ('d2i inspect')"
    )
