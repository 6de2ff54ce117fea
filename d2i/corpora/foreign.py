"""Files that are no JSON in UTF-8, and what to do with them. Must not import torch."""

from __future__ import annotations

import re

from d2i.file_kind import file_kind

_NEXT_STEPS = {
    "a Git LFS pointer": ", not the file itself; fetch it with 'git lfs pull'",
    "a web page": ", such as one to sign in at; download the file itself",
    "XML": "; expected JSON: convert it",
    "gzip": "; unpack it with 'gunzip'",
    "Zstandard": "; unpack it with 'unzstd'",
    "bzip2": "; unpack it with 'bunzip2'",
    "xz": "; unpack it with 'unxz'",
    "a zip archive": "; unpack it with 'unzip'",
    "Parquet": "; write it as JSON lines, for example with pandas' to_json(lines=True)",
    "UTF-16 text": ", as PowerShell writes it; save it again as UTF-8 (iconv -t UTF-8)",
}
# UTF-16 and UTF-32 without a byte order mark, as they begin a JSON file.
_WIDE = re.compile(rb"[\[{\s]\x00.\x00|\x00[\[{\s]\x00|\x00\x00\xfe\xff", re.DOTALL)


def foreign_kind(head: bytes) -> str | None:
    """Say what a file is that cannot be JSON in UTF-8, and what to do; None where it may be.

    Args:
        head: Its first `d2i.file_kind.HEAD_BYTES` bytes, or all that it has.
    """
    kind = "UTF-16 text" if _WIDE.match(head) else file_kind(head)
    step = _NEXT_STEPS.get(kind or "")
    return f"{kind}{step}" if step else None
