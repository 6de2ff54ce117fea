"""Fetch the bytes of a picture: from the corpus's folder, or from its addresses in order."""

from __future__ import annotations

from dataclasses import dataclass

from d2i import storage
from d2i.config import PreprocessConfig
from d2i.dialog import ImageRef
from d2i.pictures import RefusedPictureError, read_picture
from d2i.preprocess.guarded_http import Limits, RefusedRequestError, get


@dataclass(frozen=True)
class Fetched:
    """Bytes of a picture, or why there are none."""

    data: bytes | None
    reason: str = "ok"
    detail: str = ""
    attempts: int = 1
    http_status: int | None = None
    final_url: str | None = None


@dataclass(frozen=True)
class Fetcher:
    """Where pictures come from, and what one may cost.

    Args:
        image_root: Folder (any fsspec URL) that `file` references are relative to.
        limits: What one address may cost.
    """

    image_root: str
    limits: Limits

    def fetch(self, image_ref: ImageRef) -> Fetched:
        """Return the picture's bytes, or the reason of the failure; never raises for one."""
        if image_ref.kind == "file":
            return self._fetch_file(image_ref.value[0])
        return self._fetch_urls(image_ref.value)

    def _fetch_file(self, path: str) -> Fetched:
        try:
            return Fetched(read_picture(storage.join(self.image_root, path), self.limits.max_bytes))
        except RefusedPictureError as err:
            return Fetched(None, err.reason, f"{path}: {err}")

    def _fetch_urls(self, urls: tuple[str, ...]) -> Fetched:
        failure = Fetched(None, "no_address", "the instance names no address")
        for attempts, url in enumerate(urls, start=1):
            try:
                answer = get(url, self.limits)
            except RefusedRequestError as err:
                failure = Fetched(None, err.reason, str(err), attempts, err.status, url)
            else:
                return Fetched(answer.body, "ok", "", attempts, answer.status, answer.final_url)
        return failure


def build_fetcher(
    source: str, image_root: str | None, config: PreprocessConfig, allow_hosts: frozenset[str]
) -> Fetcher:
    """Return the fetcher of one job."""
    limits = Limits(config.timeout_s, int(config.max_image_mib * 2**20), allow_hosts)
    return Fetcher(image_root or source, limits)
