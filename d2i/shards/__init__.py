"""Shards: the on-disk format of prepared data. See `reader`, `writer`, `manifest`.

A data set is one directory with one split of a corpus: plain WebDataset tars, an Arrow index and a
commit record beside each, and a manifest with its own sha256. Or it is a directory of WebDataset
tars that d2i did not write, once `index_tars` has listed them. Imports neither torch nor ray.
"""

from d2i.shards.commit import Commit, FileInfo, committed_names, read_commits
from d2i.shards.dataset import data_set_url, find_data_sets, is_indexed, split_url
from d2i.shards.index_tars import IndexedTars, index_tars
from d2i.shards.layout import ArrayInfo, DeclaredArray, check_format_1, declares_arrays
from d2i.shards.manifest import (
    Manifest,
    has_valid_checksum,
    matches_checksum_file,
    merge_commits,
    other_shard_files,
    publish_manifest,
    read_manifest,
    remove_manifest,
    remove_other_shards,
    remove_uncommitted,
    write_manifest,
)
from d2i.shards.metadata import check_metadata
from d2i.shards.reader import ShardReader
from d2i.shards.restore import (
    RecoveryInputs,
    RestoreResult,
    broken_keys,
    copied_samples,
    find_recovery_inputs,
    intact_samples,
    rebuild_commit,
    restore,
)
from d2i.shards.sample import (
    IMAGE_SUFFIXES,
    Sample,
    check_json,
    json_bytes,
    npy_array,
    npy_bytes,
)
from d2i.shards.verify import verify
from d2i.shards.verify_report import ShardProblem, VerifyReport
from d2i.shards.writer import write_shard

__all__ = [
    "IMAGE_SUFFIXES",
    "ArrayInfo",
    "Commit",
    "DeclaredArray",
    "FileInfo",
    "IndexedTars",
    "Manifest",
    "RecoveryInputs",
    "RestoreResult",
    "Sample",
    "ShardProblem",
    "ShardReader",
    "VerifyReport",
    "broken_keys",
    "check_format_1",
    "check_json",
    "check_metadata",
    "committed_names",
    "copied_samples",
    "data_set_url",
    "declares_arrays",
    "find_data_sets",
    "find_recovery_inputs",
    "has_valid_checksum",
    "index_tars",
    "intact_samples",
    "is_indexed",
    "json_bytes",
    "matches_checksum_file",
    "merge_commits",
    "npy_array",
    "npy_bytes",
    "other_shard_files",
    "publish_manifest",
    "read_commits",
    "read_manifest",
    "rebuild_commit",
    "remove_manifest",
    "remove_other_shards",
    "remove_uncommitted",
    "restore",
    "split_url",
    "verify",
    "write_manifest",
    "write_shard",
]
