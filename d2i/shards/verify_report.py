"""The result of a check of a data set: what is defective in which file."""

from __future__ import annotations

from dataclasses import dataclass

from d2i.shards.commit import FileInfo


@dataclass(frozen=True)
class ShardProblem:
    """One defect of a data set.

    Attributes:
        file: Name of the file in the data set's directory.
        reason: manifest, missing, unreadable, size, sha256, commit, index, structure, member,
            duplicate or unlisted.
        detail: One line for the user.
    """

    file: str
    reason: str
    detail: str


@dataclass(frozen=True)
class VerifyReport:
    """The result of `verify`: the shards and samples checked, and the defects found."""

    num_shards: int
    num_samples: int
    problems: tuple[ShardProblem, ...]

    @property
    def ok(self) -> bool:
        """True if there is no defect."""
        return not self.problems


def compare_info(
    name: str, found: FileInfo, expected: FileInfo, record: str = "the manifest"
) -> list[ShardProblem]:
    """Compare size and sha256 of a file with what a record says: no defect, or one."""
    if found.size_bytes != expected.size_bytes:
        detail = f"{found.size_bytes} bytes; {record} says {expected.size_bytes}"
        return [ShardProblem(name, "size", detail)]
    if found.sha256 != expected.sha256:
        detail = f"{found.sha256[:16]}…; {record} says {expected.sha256[:16]}…"
        return [ShardProblem(name, "sha256", detail)]
    return []
