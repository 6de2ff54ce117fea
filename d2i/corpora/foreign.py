"""Detection of files that are not JSON in UTF-8, with advice. Must not import torch."""

from __future__ import annotations

import re

from d2i.images.file_kind import file_kind

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
# Start of a JSON file in UTF-16 or UTF-32 without a byte order mark, or UTF-32's big-endian mark.
_WIDE = re.compile(rb"[\[{\s]\x00.\x00|\x00[\[{\s]\x00|\x00\x00\xfe\xff", re.DOTALL)


def unsupported_format(head: bytes) -> str | None:
    """Return the kind of a file that cannot be JSON in UTF-8, with advice; None if it may be JSON.

    Args:
        head: Its first `d2i.images.file_kind.HEAD_BYTES` bytes, or all of a shorter file.
    """
    kind = "UTF-16 text" if _WIDE.match(head) else file_kind(head)
    step = _NEXT_STEPS.get(kind or "")
    return f"{kind}{step}" if step else None
