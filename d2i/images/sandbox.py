"""Decoder of untrusted images, with a child process for those that could be costly.

Plain JPEGs, whose cost is bounded by the size in their header, are decoded here. All others go to
a child process with a memory limit and a deadline (docs/threats.md, Images). A JPEG's header is
checked first: Pillow joins its segments as it reads them, keeps all others, and reads the bytes
between them one at a time, so a header of megabytes costs seconds or hundreds of megabytes.

    python -m d2i.images.sandbox '{"image": {...}, "max_decode_mib": 2048}'

starts that child: it answers frames on standard input with frames on standard output, until the
input ends.
"""

from __future__ import annotations

import json
import os
import re
import resource
import select
import struct
import subprocess
import sys
import time
from itertools import islice
from typing import IO, Any

import numpy as np
from PIL import Image

from d2i.config import ImageConfig
from d2i.errors import ClusterError
from d2i.images.decode import CroppedImage, ImageRejectedError, decode_square, open_header

_LENGTH = struct.Struct("<Q")
_JPEG = b"\xff\xd8\xff"
_SCAN = re.compile(rb"\xff\xda")
_MAX_PLAIN_SCANS = 8
"""An image has at most three scans, and its thumbnails as many again; thousands are an attack."""
_MAX_PLAIN_PIXELS = 25_000_000
"""JPEGs of up to this many pixels take at most 75 MB and a quarter of a second to decode."""
_START_S = 120.0
_SEGMENT = struct.Struct(">BBH")
_FIRST_SEGMENT = 2
"""Offset of the first segment, after the start-of-image marker."""
_MARKER = 0xFF
_START_OF_SCAN = 0xDA
_ALONE = frozenset({0x00, 0x01, _MARKER, *range(0xD0, 0xDA)})
"""Markers without a length: fill bytes, restarts, start and end of image."""
_MAX_SEGMENTS = 200
_MAX_HEADER_BYTES = 1 << 20
"""Limits of a header. Cameras and editors write about ten segments, a few hundred kB at most."""


class Decoder:
    """Decodes and crops images, risky ones in a child process. For one thread at a time.

    Args:
        image: The decode policy and the resolution.
        timeout_s: Time limit of the child for one image.
        max_decode_mib: Memory limit of the child.
    """

    def __init__(self, image: ImageConfig, timeout_s: float, max_decode_mib: int) -> None:
        self._image = image
        self._timeout_s = timeout_s
        self._max_decode_mib = max_decode_mib
        self._child: subprocess.Popen[bytes] | None = None

    def decode(self, data: bytes) -> CroppedImage:
        """Return the square crop of an image.

        Raises:
            ImageRejectedError: As `d2i.images.decode.decode_image` does; `decode_timeout` or
                `decode_memory` if an image costs too much.
        """
        # Other headers are not safe to open here: a WebP's allocates the whole canvas.
        if data.startswith(_JPEG) and is_small_header(data):
            image = open_header(data, self._image)
            if _is_plain(image, data):
                try:
                    return decode_square(image, self._image)
                except MemoryError as err:
                    raise ImageRejectedError("decode_memory", "takes too much memory") from err
        header, pixels = self._decode_with_retry(data)
        if "reason" in header:
            raise ImageRejectedError(header["reason"], header["detail"])
        side = self._image.resolution
        square = np.frombuffer(pixels, np.uint8).reshape(side, side, 3)
        return CroppedImage(square, header["suffix"], header["width"], header["height"])

    def close(self) -> None:
        """Kill the child; a new one is started when needed."""
        if self._child is None:
            return
        self._child.kill()
        self._child.communicate()
        self._child = None

    def _decode_with_retry(self, data: bytes) -> tuple[dict[str, Any], bytes]:
        """Decode in the child; retry once in a new one if it died, maybe for another reason."""
        for is_last in (False, True):
            try:
                return self._decode_in_child(data)
            except TimeoutError as err:
                self.close()
                raise ImageRejectedError("decode_timeout", f"over {self._timeout_s:g} s") from err
            except (EOFError, BrokenPipeError) as err:
                self.close()
                if is_last:
                    raise ImageRejectedError("decode_error", "the decoder process crashed") from err
            except BaseException:
                # Bytes left in the pipe would be read as the answer for the next image.
                self.close()
                raise
        raise AssertionError("one of the two returned or raised")

    def _decode_in_child(self, data: bytes) -> tuple[dict[str, Any], bytes]:
        child = self._child or self._start()
        pipes = _Pipes(child, time.monotonic() + self._timeout_s)
        pipes.send(data)
        header = json.loads(pipes.receive())
        return header, b"" if "reason" in header else pipes.receive()

    def _start(self) -> subprocess.Popen[bytes]:
        settings = {"image": self._image.model_dump(), "max_decode_mib": self._max_decode_mib}
        self._child = subprocess.Popen(
            [sys.executable, "-m", "d2i.images.sandbox", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            # Threads of numpy would use up the limited address space.
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )
        # Its imports must not count against the first image's deadline.
        try:
            _Pipes(self._child, time.monotonic() + _START_S).receive()
        except (EOFError, TimeoutError) as err:
            raise ClusterError(
                "the decoder process did not start; see its output above, or raise its memory "
                "limit with --set fetch.max_decode_mib=MIB"
            ) from err
        return self._child


class _Pipes:
    """Frames to and from a child until a deadline, even if it neither reads nor answers."""

    def __init__(self, child: subprocess.Popen[bytes], deadline: float) -> None:
        self._to_child = _pipe(child.stdin).fileno()
        self._from_child = _pipe(child.stdout).fileno()
        self._deadline = deadline
        # A blocking write to a full pipe would ignore the deadline.
        os.set_blocking(self._to_child, False)

    def send(self, data: bytes) -> None:
        """Write one frame.

        Raises:
            TimeoutError: At the deadline.
            BrokenPipeError: If the child has ended.
        """
        for part in (_LENGTH.pack(len(data)), data):
            rest = memoryview(part)
            while rest:
                if not select.select([], [self._to_child], [], self._left())[1]:
                    raise TimeoutError
                rest = rest[os.write(self._to_child, rest) :]

    def receive(self) -> bytes:
        """Read one frame.

        Raises:
            TimeoutError: At the deadline.
            EOFError: If the child has ended.
        """
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        return self._read(length)

    def _read(self, length: int) -> bytes:
        chunks = bytearray()
        while len(chunks) < length:
            if not select.select([self._from_child], [], [], self._left())[0]:
                raise TimeoutError
            chunk = os.read(self._from_child, length - len(chunks))
            if not chunk:
                raise EOFError
            chunks += chunk
        return bytes(chunks)

    def _left(self) -> float:
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        return left_s


def _is_plain(image: Image.Image, data: bytes) -> bool:
    """Return whether a JPEG is baseline and of bounded cost, by its header and markers alone."""
    return (
        "progressive" not in image.info
        and image.width * image.height <= _MAX_PLAIN_PIXELS
        # Counted lazily, as an attack may have millions of scans.
        and sum(1 for _ in islice(_SCAN.finditer(data), _MAX_PLAIN_SCANS + 1)) <= _MAX_PLAIN_SCANS
    )


def _answer(data: bytes, image: ImageConfig) -> list[bytes]:
    """Return the child's answer for one image, as frames."""
    try:
        found = decode_square(open_header(data, image), image)
    except ImageRejectedError as err:
        return [json.dumps({"reason": err.reason, "detail": str(err)}).encode()]
    except MemoryError:
        return [json.dumps({"reason": "decode_memory", "detail": "takes too much memory"}).encode()]
    header = {"suffix": found.suffix, "width": found.width, "height": found.height}
    return [json.dumps(header).encode(), found.pixels.tobytes()]


def _write_frame(pipe: IO[bytes], data: bytes) -> None:
    pipe.write(_LENGTH.pack(len(data)))
    pipe.write(data)
    pipe.flush()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def main() -> None:
    """Answer frames until standard input ends, which it does when the parent dies."""
    settings = json.loads(sys.argv[1])
    image = ImageConfig.model_validate(settings["image"])
    max_bytes = settings["max_decode_mib"] << 20
    resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    _write_frame(answers, b"ready")
    while head := requests.read(_LENGTH.size):
        data = requests.read(*_LENGTH.unpack(head))
        for frame in _answer(data, image):
            _write_frame(answers, frame)


if __name__ == "__main__":
    main()


def is_small_header(data: bytes) -> bool:
    """Return whether a JPEG's header is only a few short, adjacent segments up to a scan."""
    position = _FIRST_SEGMENT
    for _ in range(_MAX_SEGMENTS):
        if position + _SEGMENT.size > min(len(data), _MAX_HEADER_BYTES):
            return False
        mark, kind, length = _SEGMENT.unpack_from(data, position)
        if mark != _MARKER or kind in _ALONE:
            return False
        if kind == _START_OF_SCAN:
            return True
        position += 2 + length
    return False
