"""Guard against malicious torch files: no code and no memory bombs, checked before torch loads.

torch's `weights_only` refuses code as well, but allocates whatever the file requests: a few hundred
bytes can request a bytearray of any size, and a compressed file can unpack to any size.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from pathlib import Path
from typing import IO

from d2i.errors import CheckpointError

ZIP_MAGIC = b"PK\x03\x04"
# A state dict names a few hundred tensors in 60 kB. Each pickle byte can cost a hundred in memory.
_MAX_PICKLE_BYTES = 4_000_000
# The format before 2020: magic number, version, machine, state dict, and its storages' names.
_NUM_OLD_PICKLES = 5
_TENSORS_ALONE = re.compile(
    r"collections OrderedDict"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter)"
    r"|torch(\.storage)? \w+Storage"
    r"|torch (bfloat16|(float|complex|int|uint)\w+|bool)"
)


def check_torch_file(file: Path) -> None:
    """Check that a file saved by torch holds tensors by name and nothing else.

    Raises:
        CheckpointError: If it would create anything else, or is compressed.
        Exception: Whatever the standard library raises for a corrupt file.
    """
    with file.open("rb") as stream:
        is_zip = stream.read(len(ZIP_MAGIC)) == ZIP_MAGIC
        stream.seek(0)
        if is_zip:
            _check_zip(file, stream)
        else:
            for _ in range(_NUM_OLD_PICKLES):
                _check_pickle(file, stream)


def _check_zip(file: Path, stream: IO[bytes]) -> None:
    with zipfile.ZipFile(stream) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(
                    f"{file} is compressed; expected a file as torch.save writes it; unpack it and "
                    "use the file inside"
                )
            if member.filename.endswith(".pkl"):
                with archive.open(member) as pickled:
                    _check_pickle(file, pickled)


def _check_pickle(file: Path, pickled: IO[bytes]) -> None:
    start = pickled.tell()
    for code, argument, _ in pickletools.genops(pickled):
        is_code = code.name == "GLOBAL" and not _TENSORS_ALONE.fullmatch(str(argument))
        if is_code or code.name == "STACK_GLOBAL":
            raise CheckpointError(
                f"{file} is a pickle that holds more than tensors, which d2i never runs; save only "
                "its state dict and use that file"
            )
        if pickled.tell() - start > _MAX_PICKLE_BYTES:
            raise CheckpointError(
                f"{file} holds over {_MAX_PICKLE_BYTES} bytes besides its tensors; expected a flat "
                "state dict; save only that and use that file"
            )
