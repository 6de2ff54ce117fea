"""In which order addresses are asked: those of one host spread evenly over all."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable

from d2i.dialog import ImageRef


def interleave_by_host(refs: Iterable[ImageRef]) -> list[ImageRef]:
    """Order pictures so that neighbours are of different hosts, where there are several.

    In the order of their addresses a dead host's would all be under way before the first one
    shows that it is dead, and the pace of one host would hold up the others. The order is a
    function of the set of pictures.
    """
    by_host: dict[str, list[ImageRef]] = defaultdict(list)
    for ref in sorted(refs, key=lambda ref: ref.value):
        by_host[_host(ref)].append(ref)
    placed: list[tuple[float, str, ImageRef]] = []
    for host, its in by_host.items():
        # Hosts begin at different places, or their first ones would all come together.
        begin = zlib.crc32(host.encode()) / 2**32
        placed += [((number + begin) / len(its), host, ref) for number, ref in enumerate(its)]
    return [ref for _, _, ref in sorted(placed, key=lambda place: place[:2])]


def _host(ref: ImageRef) -> str:
    """Return what stands between the slashes, right or wrong."""
    parts = ref.value[0].split("/", 3) if ref.value else []
    return parts[2].lower() if len(parts) > 2 else ""
