"""Files that are no JSON in UTF-8, told by their first bytes. Must not import torch."""

from __future__ import annotations

import re

HEAD_BYTES = 512
"""How much of a file's start tells its kind."""

_KINDS: tuple[tuple[bytes, str], ...] = (
    (
        rb"version https://git-lfs",
        "a Git LFS pointer, not the file itself; fetch it with 'git lfs pull'",
    ),
    (
        rb"(?i:(?:\xef\xbb\xbf)?\s*<(?:!doctype\s+html|html|head|body|script))",
        "a web page, such as one to sign in at; download the file itself",
    ),
    (rb"(?:\xef\xbb\xbf)?\s*<\?xml", "XML; expected JSON: convert it"),
    (rb"\x1f\x8b", "compressed by gzip; unpack it with 'gunzip'"),
    (rb"\x28\xb5\x2f\xfd", "compressed by zstd; unpack it with 'unzstd'"),
    (rb"BZh[1-9]", "compressed by bzip2; unpack it with 'bunzip2'"),
    (rb"\xfd7zXZ\x00", "compressed by xz; unpack it with 'unxz'"),
    (rb"PK\x03\x04", "a ZIP archive; unpack it with 'unzip'"),
    (rb"PAR1", "Parquet; write it as JSON lines, for example with pandas' to_json(lines=True)"),
    (
        rb"(?s:\xff\xfe.\x00|\xfe\xff\x00|\x00\x00\xfe\xff|[\[{\s]\x00.\x00|\x00[\[{\s]\x00)",
        "UTF-16 or UTF-32, as PowerShell writes it; save it anew as UTF-8 (iconv -t UTF-8)",
    ),
)
_COMPILED = tuple((re.compile(pattern), said) for pattern, said in _KINDS)


def foreign_kind(head: bytes) -> str | None:
    """Say what a file is that cannot be JSON in UTF-8, and what to do; None where it may be.

    Args:
        head: Its first `HEAD_BYTES` bytes, or all that it has.
    """
    return next((said for pattern, said in _COMPILED if pattern.match(head)), None)
