"""The fetch worker: one planned shard at a time, from records to decoded images as they arrive."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from d2i.cluster import JobFault, SharedActor
from d2i.config import Recipe
from d2i.dialog import ImageRef, Instance
from d2i.errors import ClusterError
from d2i.fetch.result import FetchResult
from d2i.fetch.sources import ImageSource
from d2i.images.decode import ImageRejectedError
from d2i.images.sandbox import Decoder
from d2i.preprocess.plan.inline_images import read_inline
from d2i.preprocess.progress import Tally
from d2i.preprocess.reuse import Reuse, ReusedSplits
from d2i.preprocess.workers.messages import (
    FetchedBlock,
    FetchedImage,
    ShardTask,
    SourceImage,
    keeps_source,
)

_BLOCK = 16
"""Images per block, which take 3 MB at 256 pixels."""
_BLOCK_BYTES = 8 << 20
"""Source bytes after which a block ends, however few images it holds."""


@dataclass(frozen=True)
class FetchWorkerBuilder:
    """Picklable builder of the fetch worker, called where the worker runs."""

    images: ImageSource
    recipe: Recipe
    tally: SharedActor[Tally]
    fault: JobFault | None = None
    reuse: Reuse | None = None

    def __call__(self) -> FetchWorker:
        """Return the worker; send no request yet."""
        return FetchWorker(self)


class FetchWorker:
    """`stream` fetches and decodes the images of one shard. Holds at most one block of them."""

    def __init__(self, builder: FetchWorkerBuilder) -> None:
        self._recipe = builder.recipe
        self._source = builder.images
        self._tally = builder.tally
        self._fault = builder.fault
        self._reused = ReusedSplits(builder.reuse)
        fetch = builder.recipe.fetch
        self._decoder = Decoder(builder.recipe.image, fetch.decode_timeout_s, fetch.max_decode_mib)

    def stream(self, task: ShardTask) -> Iterator[FetchedBlock]:
        """Yield the instances of a shard, then the result of each distinct image as it arrives.

        Raises:
            ClusterError: If this machine's network seems to have an outage.
        """
        instances = task.read_instances()
        yield FetchedBlock((), instances)
        block: list[FetchedImage] = []
        for found in self._results(task, instances):
            self._trigger_at("fetch.picture")
            block.append(found)
            if len(block) == _BLOCK or _num_source_bytes(block) >= _BLOCK_BYTES:
                yield self._counted(block)
                block = []
        self._refuse_outage(of_names=bool(task.failed_before))
        self._trigger_at("fetch.shard")
        yield self._counted(block)

    def _results(self, task: ShardTask, instances: Sequence[Instance]) -> Iterator[FetchedImage]:
        """Open the images of a shard, reused source bytes first."""
        known = self._reused.known(task, instances, self._recipe)
        kept = {i.image_ref for i in instances if keeps_source(i, self._recipe)}

        def opened(ref: ImageRef, fetched: FetchResult) -> FetchedImage:
            return open_image(ref, fetched, self._decoder, is_kept=ref in kept)

        for ref, data in self._reused.source_bytes(task, instances, self._recipe):
            detail = "source bytes reused from earlier data"
            yield opened(ref, FetchResult(data, detail=detail, attempts=0))
        wanted = {instance.image_ref for instance in instances} - known
        yield from self._source.fetch(wanted, opened, partial(read_inline, task.split_url))

    def _counted(self, images: list[FetchedImage]) -> FetchedBlock:
        self._tally.call("add", [found.fetched.reason for found in images])
        return FetchedBlock(images)

    def _refuse_outage(self, *, of_names: bool) -> None:
        """Raise on a network outage, before ledger rows count all images as dead.

        A supplement holds only earlier failures: hosts that are still unreachable tell nothing
        new, and their rows stay `passing`; names that do not resolve would make them permanent.
        """
        if trouble := self._source.outage_reason(of_names=of_names):
            raise ClusterError(
                f"{trouble}: this looks like an outage of this machine's network, not like dead "
                "URLs; expected some hosts to answer; no ledger rows were written for this shard; "
                "fix the network (DNS, firewall) and repeat the command; if the URLs really are "
                "dead, add --set fetch.num_trouble_hosts=0"
            )

    def _trigger_at(self, point: str) -> None:
        if self._fault:
            self._fault.trigger_at(point)


def _num_source_bytes(block: list[FetchedImage]) -> int:
    return sum(len(found.fetched.data or b"") for found in block)


def open_image(
    ref: ImageRef, fetched: FetchResult, decoder: Decoder, *, is_kept: bool
) -> FetchedImage:
    """Decode and crop fetched bytes, or pass the failure on with its reason.

    Args:
        ref: The image's reference.
        fetched: Its bytes, or the reason why there are none.
        decoder: The decoder to use.
        is_kept: Whether to pass the source bytes on too.
    """
    source_image = None
    if fetched.data is not None:
        try:
            source_image = _source_image(fetched.data, decoder)
        except ImageRejectedError as err:
            fetched = fetched.refused(err.reason, str(err))
    handed_on = fetched if is_kept else fetched.without_data()
    return FetchedImage(ref, handed_on, source_image, time.time())


def _source_image(data: bytes, decoder: Decoder) -> SourceImage:
    found = decoder.decode(data)
    return SourceImage(
        pixels=found.pixels,
        suffix=found.suffix,
        width=found.width,
        height=found.height,
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )
