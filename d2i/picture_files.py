"""Pictures by their names: the files of a folder, or the members of tars, behind one call.

Must not import torch.
"""

from __future__ import annotations

import re
from functools import cache

from d2i import storage
from d2i.errors import ConfigError
from d2i.pictures import RefusedPictureError
from d2i.tars import Member, TarIndex, is_tars, open_index

_NUM_ALIKE = 8
_WEB_ADDRESS = re.compile(r"(^|::)https?:", re.IGNORECASE)
"""Also as what another file system lies on: `simplecache::https://…`."""


def read_picture(root: str, path: str, max_bytes: int) -> bytes:
    """Read the bytes of a picture file.

    Args:
        root: A folder (any fsspec URL but a web address), `x.tar`, or `folder/*.tar`.
        path: The picture's name below it; of a tar's member the first folders may be left out.
        max_bytes: Its greatest length.

    Raises:
        RefusedPictureError: `missing_file`, `read_error` or `too_many_bytes`; of a tar also
            `refused_member` (a link or a device), and `ambiguous_file` where several members have
            that name and are not the same.
        ConfigError: If the root is a web address, of which nothing is asked.
        DataError: If the tars cannot be read at all.
    """
    _refuse_web_address(root)
    try:
        if is_tars(root):
            data = _read_member(_index(root), path, max_bytes)
        else:
            data = storage.read_head(picture_url(root, path), max_bytes + 1)
    except FileNotFoundError as err:
        raise RefusedPictureError("missing_file", "no such file") from err
    except (OSError, ValueError) as err:
        # A name with a zero byte is a ValueError.
        raise RefusedPictureError("read_error", str(err)) from err
    if len(data) > max_bytes:
        raise RefusedPictureError("too_many_bytes", f"over {max_bytes} bytes")
    return data


def picture_url(root: str, path: str) -> str:
    """Return where a picture of a folder is read; a path with a part `..` raises ValueError."""
    if ".." in path.split("/"):
        raise ValueError("got a part '..', expected a path below the folder")
    return storage.join(root, path)


def _refuse_web_address(root: str) -> None:
    """Refuse what could redirect anywhere: web addresses are asked through the guard alone."""
    if _WEB_ADDRESS.search(root):
        raise ConfigError(
            f"{root}: got a web address as the place of pictures; expected a folder, tars or an "
            "object store; give --set 'fetch.mirror=ADDRESS/{path}' to 'd2i preprocess', or copy "
            "the pictures first"
        )


@cache
def _index(root: str) -> TarIndex:
    """Return the one index of this process."""
    return open_index(root)


def _read_member(index: TarIndex, path: str, max_bytes: int) -> bytes:
    found = index.find(path)
    if not found:
        raise FileNotFoundError
    if len(found) > _NUM_ALIKE:
        raise RefusedPictureError("ambiguous_file", f"{len(found)} members have this name")
    contents = {_read_range(member, max_bytes) for member in found}
    if len(contents) > 1:
        raise RefusedPictureError("ambiguous_file", "different members have this name")
    return contents.pop()


def _read_range(member: Member | None, max_bytes: int) -> bytes:
    if member is None:
        raise RefusedPictureError("refused_member", "a link or a device, not a file")
    if member.size_bytes > max_bytes:
        raise RefusedPictureError("too_many_bytes", f"over {max_bytes} bytes")
    data = storage.read_range(member.url, member.offset, member.size_bytes)
    if len(data) != member.size_bytes:
        raise RefusedPictureError("read_error", f"{member.url} ends within it")
    return data
