"""The list of instances that `--exclude` leaves out, such as the leaks that `d2i corpus` finds."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import msgspec

from d2i.dialog import SPLITS, split_of_key
from d2i.errors import ConfigError
from d2i.io import storage


@dataclass(frozen=True)
class Exclusion:
    """Keys to leave out, and a hash of them that does not depend on their order."""

    keys: frozenset[str]
    sha256: str | None

    def num_of(self, split: str) -> int:
        """Count the keys of one split."""
        return sum(split_of_key(key) == split for key in self.keys)


NOTHING = Exclusion(frozenset(), None)


class _Line(msgspec.Struct):
    key: str


def read_exclusion(url: str) -> Exclusion:
    """Read a list of instance keys: one per line, bare or as the `key` of a JSON object.

    Raises:
        ConfigError: If there is no such file, or a line holds no key.
    """
    try:
        lines = storage.read_bytes(url).removeprefix(b"\xef\xbb\xbf").splitlines()
    except FileNotFoundError:
        raise ConfigError(f"--exclude {url}: no such file; check the path") from None
    keys = frozenset(
        _key(line.strip(), f"--exclude {url} line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    )
    return Exclusion(keys, hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest())


def _key(line: bytes, where: str) -> str:
    try:
        key = msgspec.json.decode(line, type=_Line).key if line[:1] == b"{" else line.decode()
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{where}: {error}; expected an instance key, or a JSON object with a key"
        ) from None
    if split_of_key(key) not in SPLITS:
        raise ConfigError(
            f"{where}: got {key[:40]!r}, expected an instance key such as train-7-2-0 and nothing "
            "else, or a JSON object with a key"
        )
    return key
