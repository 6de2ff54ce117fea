"""Request order: the URLs of each host are spread evenly over the whole."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable

from d2i.dialog import ImageRef


def interleave_by_host(refs: Iterable[ImageRef]) -> list[ImageRef]:
    """Order images so that neighbours are of different hosts, if there are several.

    Sorted by URL, all requests to a dead host would be in flight before the first one shows that it
    is dead, and the rate limit of one host would hold up the others. The order is a function of the
    set of images.
    """
    by_host: dict[str, list[ImageRef]] = defaultdict(list)
    for ref in sorted(refs, key=lambda ref: ref.value):
        by_host[_host(ref)].append(ref)
    placed: list[tuple[float, str, ImageRef]] = []
    for host, its in by_host.items():
        # Each host starts at its own offset; otherwise all their first URLs would come together.
        begin = zlib.crc32(host.encode()) / 2**32
        placed += [((number + begin) / len(its), host, ref) for number, ref in enumerate(its)]
    return [ref for _, _, ref in sorted(placed, key=lambda place: place[:2])]


def _host(ref: ImageRef) -> str:
    """Return the host part of an image's first URL, valid or not."""
    parts = ref.value[0].split("/", 3) if ref.value else []
    return parts[2].lower() if len(parts) > 2 else ""
