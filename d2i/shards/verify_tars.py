"""Check tars that d2i did not write against what `d2i index` recorded of them.

Must not import torch or ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from d2i.errors import ShardError
from d2i.io import checksums, storage
from d2i.io.prefetch import prefetch_map
from d2i.shards.index import IndexRow, read_index
from d2i.shards.tar_scan import scan_tar
from d2i.shards.tar_set import (
    INDEX_DIRECTORY,
    LIST_NAME,
    IndexedTar,
    TarSet,
    is_tar_name,
    list_url,
    read_tar_set,
)
from d2i.shards.verify_report import ShardProblem, VerifyReport, compare_info
from d2i.shards.writer import file_info

_LIST = f"{INDEX_DIRECTORY}/{LIST_NAME}"


def verify_tars(
    url: str,
    *,
    num_threads: int = 4,
    on_progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Read every byte of indexed tars, and report whatever differs from the index.

    Args:
        url: The directory of the tars.
        num_threads: Tars checked at once.
        on_progress: Called in this thread with the number of tars done, and their total.

    Returns:
        Tars and samples as they were indexed, and the defects, sorted by file name.
    """
    try:
        tars = read_tar_set(url)
    except (ShardError, OSError) as err:
        return VerifyReport(0, 0, (ShardProblem(_LIST, "manifest", str(err)),))
    problems = [*_unsummed(url), *_unlisted(url, tars)]
    checks = prefetch_map(partial(_check, url), tars.shards, num_threads)
    for done, found in enumerate(checks, start=1):
        problems += found
        if on_progress is not None:
            on_progress(done, len(tars.shards))
    problems.sort(key=lambda problem: (problem.file, problem.reason))
    return VerifyReport(len(tars.shards), tars.num_samples, tuple(problems))


def _unsummed(url: str) -> list[ShardProblem]:
    """Name the checksum of the list if it is gone: nothing else tells whether that changed."""
    if storage.exists(checksums.checksum_url(list_url(url))):
        return []
    detail = f"the sha256 of the list is not there; run `d2i index {url}` again"
    return [ShardProblem(_LIST + checksums.SUFFIX, "missing", detail)]


def _unlisted(url: str, tars: TarSet) -> list[ShardProblem]:
    listed = {tar.tar_name for tar in tars.shards}
    names = [name for name in storage.list_names(url) if is_tar_name(name) and name not in listed]
    return [ShardProblem(name, "unlisted", _how_to_add(url, name)) for name in names]


def _how_to_add(url: str, name: str) -> str:
    first = "" if name.endswith(".tar") else "rename it to .tar, and "
    return f"not in the index; {first}run `d2i index {url}` to add it"


def _check(url: str, tar: IndexedTar) -> list[ShardProblem]:
    problems: list[ShardProblem] = []
    rows: list[IndexRow] | None = None
    try:
        data = storage.read_bytes(storage.join(url, tar.index_name))
        problems += compare_info(tar.index_name, file_info(data), tar.index_file, _LIST)
        index = read_index(
            data, tar.layout, num_samples=tar.num_samples, tar_size_bytes=tar.filesize
        )
        rows = list(index.rows())
    except FileNotFoundError:
        detail = f"the index of {tar.tar_name} is not there; run `d2i index {url}` again"
        problems.append(ShardProblem(tar.index_name, "missing", detail))
    except OSError as err:
        problems.append(ShardProblem(tar.index_name, "unreadable", str(err)))
    except ShardError as err:
        problems.append(ShardProblem(tar.index_name, "index", str(err)))
    return [*problems, *_check_tar(url, tar, rows)]


def _check_tar(url: str, tar: IndexedTar, rows: list[IndexRow] | None) -> Iterator[ShardProblem]:
    name = tar.tar_name
    try:
        found = scan_tar(storage.join(url, name))
    except FileNotFoundError:
        yield ShardProblem(name, "missing", "listed in the index, but not there")
        return
    except OSError as err:
        yield ShardProblem(name, "unreadable", str(err))
        return
    except ShardError as err:
        yield ShardProblem(name, "structure", str(err))
        return
    for problem in compare_info(name, found.info, tar.tar, _LIST):
        detail = f"{problem.detail}; the tar changed since it was indexed"
        yield ShardProblem(name, problem.reason, f"{detail}: copy it again, or run `d2i index`")
    for row, indexed in zip(found.rows, rows or [], strict=False):
        yield from _damaged_members(name, row, indexed)
    if found.info == tar.tar and rows is not None and found.rows != rows:
        detail = f"does not describe the members of {name}; run `d2i index {url}` again"
        yield ShardProblem(tar.index_name, "index", detail)


def _damaged_members(name: str, row: IndexRow, indexed: IndexRow) -> Iterator[ShardProblem]:
    """Name the members of a sample whose content changed in place."""
    changed = [
        suffix
        for suffix, extent in row.extents.items()
        if (was := indexed.extents.get(suffix)) is not None
        and (extent.offset, extent.size_bytes) == (was.offset, was.size_bytes)
        and extent.crc32 != was.crc32
    ]
    if changed and row.key == indexed.key:
        detail = f"{row.key}: {', '.join(changed)} do not match their checksum"
        yield ShardProblem(name, "member", detail)
