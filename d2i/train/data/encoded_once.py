"""Text conditions that are encoded before training, while the network is still on the CPU."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable
from functools import cached_property
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from d2i.encoders.pipeline_text import Encoded, join_encoded
from d2i.errors import ConfigError

if TYPE_CHECKING:
    from d2i.train.data.text_source import TextSource

_PADDED = ("text", "mask")


class EncodedOnce:
    """The conditions of all samples of a data set, encoded at the first read, in a scratch file.

    A text takes the bytes of its real tokens: in bfloat16, 5 KB a token for Z-Image, and 7.9 MB for
    any text of FLUX.2 klein (4B). The file is deleted with the process; `TMPDIR` says where it is.

    Args:
        load: Loads the encoder; it is freed again once the texts are encoded.
        num_samples: Samples of the data set.
        batch_size: Samples per call of the encoder.
    """

    def __init__(self, load: Callable[[], TextSource], num_samples: int, batch_size: int) -> None:
        self._load, self._num_samples, self._batch_size = load, num_samples, batch_size
        # Readers are threads, and one of them encodes for all.
        self._lock = threading.Lock()
        self._encoded: _ScratchRows | None = None

    @cached_property
    def empty(self) -> Encoded:
        """The conditions in place of those that are dropped."""
        return self._load().empty

    def _encode_all(self) -> _ScratchRows:
        source, rows = self._load(), _ScratchRows()
        for start in range(0, self._num_samples, self._batch_size):
            indices = np.arange(start, min(start + self._batch_size, self._num_samples))
            encoded = source.read(indices)
            for row in range(len(indices)):
                rows.append(_trimmed({name: part[row] for name, part in encoded.items()}))
            if start == 0:
                _check_space(rows.num_bytes * self._num_samples // len(indices))
        rows.map()
        return rows

    def prepare(self) -> _ScratchRows:
        """Encode all texts, if that is not done yet."""
        with self._lock:
            if self._encoded is None:
                self._encoded = self._encode_all()
            return self._encoded

    def read(self, indices: NDArray[np.int64]) -> Encoded:
        """Return the conditions of samples, each (B, ...), filled up to the longest text."""
        rows = self.prepare()
        found = [rows.read(int(index)) for index in indices]
        return join_encoded([{name: part[None] for name, part in row.items()} for row in found])


def _check_space(num_bytes: int) -> None:
    """Check that about as many bytes are free where the file is.

    Raises:
        ConfigError: If they are not.
    """
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if num_bytes > free:
        raise ConfigError(
            f"train.text_encoder_memory=free: {tempfile.gettempdir()} has {free / 1e9:.3g} GB "
            f"free; expected about {num_bytes / 1e9:.3g} GB for the texts of every rank; set "
            "TMPDIR to a larger disk, or use keep or offload"
        )


def _trimmed(row: Encoded) -> Encoded:
    """Return one sample's conditions without the padding after its text."""
    if "mask" not in row:
        return row
    length = int(np.flatnonzero(row["mask"])[-1]) + 1 if row["mask"].any() else 1
    return {name: part[:length] if name in _PADDED else part for name, part in row.items()}


class _ScratchRows:
    """Arrays of samples in a file without a name, one sample after the other."""

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="d2i-text-")  # noqa: SIM115
        self._places: list[dict[str, tuple[int, str, tuple[int, ...], bool]]] = []
        self._end = 0
        self._mapped: NDArray[np.uint8] = np.empty(0, np.uint8)

    @property
    def num_bytes(self) -> int:
        """Bytes written so far."""
        return self._end

    def append(self, row: Encoded) -> None:
        """Write the arrays of the next sample."""
        places = {}
        for name, array in row.items():
            halved = _halved(array)
            kept = array if halved is None else halved
            data = np.ascontiguousarray(kept).tobytes()
            places[name] = (self._end, kept.dtype.str, kept.shape, halved is not None)
            self._file.write(data)
            self._end += len(data)
        self._places.append(places)

    def map(self) -> None:
        """Map the file into memory, once all samples are written."""
        self._file.flush()
        self._mapped = np.memmap(self._file, np.uint8, "r")

    def read(self, index: int) -> Encoded:
        """Return the arrays of a sample."""
        found = {}
        for name, (start, dtype, shape, is_halved) in self._places[index].items():
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            array = self._mapped[start : start + size].view(dtype).reshape(shape)
            found[name] = (array.astype(np.uint32) << 16).view(np.float32) if is_halved else array
        return found


def _halved(array: NDArray[np.generic]) -> NDArray[np.uint16] | None:
    """Return float32 numbers as bfloat16, if they all are such numbers; else None."""
    if array.dtype != np.float32:
        return None
    bits = np.ascontiguousarray(array).view(np.uint32)
    return None if (bits & 0xFFFF).any() else (bits >> 16).astype(np.uint16)
