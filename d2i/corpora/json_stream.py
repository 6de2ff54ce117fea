"""Streaming JSON parser that recovers from broken records.

Reads one object per line (JSON lines), one array, and concatenated objects (indented or not).
Memory is bounded by one object and one read, time by the file's size. Broken parts are reported
with their position and skipped; the objects around them are still read. Must not import torch.
"""

import re
from collections.abc import Callable, Collection, Iterator
from typing import IO, Any

import msgspec

from d2i.corpora.records import Reason, RecordError, RecordIssue, Report

CHUNK_BYTES = 1 << 16
MAX_RECORD_BYTES = 4 << 20
"""A larger object is skipped. MMDialog's largest take about 125 kB."""
MAX_RESYNCS = 1000
"""Limit on resyncs, searches for the next object, in one file that is not JSON lines."""
_NUM_RESCANNED = 64
"""Limit on bytes scanned in vain, beyond those read so far, in records of the largest size: seconds
of work."""
_MAX_DEPTH = 1024
"""Limit on nesting; no record of a corpus is nested deeper."""
_UNKNOWN_LENGTH = 2048
"""Assumed length of a record in bytes, if none could be read."""

_BOM = b"\xef\xbb\xbf"
_BROKEN = object()
_NOT_JSON = re.compile(rb"NaN|Infinity|\\u[dD][89a-fA-F]")

_Parse = Callable[[bytes], Any]
_OVERLAP_BYTES, _LOOK_BACK_BYTES = 1024, 64
_LINE_END = ord("\n")
_BLANK = re.compile(rb"\s*+")
_SEPARATORS = re.compile(rb"[\s,\[\]]*+")
_OPEN_STRING = rb'"[^"\\\n]*+(?:\\.[^"\\\n]*+)*+'
# Skips whole strings up to the next bracket, or up to a string that its line end cuts off.
_TO_BRACKET = re.compile(
    rb'[^"{}\[\]]*+(?:%b"[^"{}\[\]]*+)*+(?:[{}\[\]]|%b\n)' % (_OPEN_STRING, _OPEN_STRING)
)
_FIRST_KEY = re.compile(rb'\{\s*+(%b")\s*+:' % _OPEN_STRING)
_LINE_START = re.compile(rb"\n(\{)")


def read_objects(
    stream: IO[bytes],
    path: str,
    report: Report,
    kind: Any = Any,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    max_record_bytes: int = MAX_RECORD_BYTES,
) -> Iterator[tuple[str, Any]]:
    """Read the JSON objects of a file, in order, one at a time.

    Non-standard output of Python's and JavaScript's JSON writers is accepted and reported as
    `repaired`: NaN and infinities become null, half of a surrogate pair U+FFFD.

    Args:
        stream: The file, opened for reading bytes, at its start.
        path: Name of the file in `where`.
        report: Called with a `RecordIssue` for everything that is not JSON.
        kind: The type that each object is decoded to. Fields that it does not name are skipped
            without being built: most of a record with a thousand negative candidates.
        chunk_bytes: Size of one read.
        max_record_bytes: A larger object is skipped.

    Yields:
        `where` (path with line from 1, or with byte offset from 0) and the object, or a
        `RecordError` with the reason why it is not of this kind. In a file of lines the value of
        a line may be something other than an object.
    """
    parse = _parser(kind)
    view = _View(stream, chunk_bytes, max_record_bytes)
    if not view.find_start():
        report(RecordIssue("empty_file", path, "nothing but white space"))
    elif _holds_lines(view, parse):
        yield from _lines(view, path, report, parse)
    else:
        yield from _Objects(view, path, report, parse, _keys(kind))


class _View:
    """A sliding window on a byte stream; `pos` is the read position in it."""

    def __init__(self, stream: IO[bytes], chunk_bytes: int, max_record_bytes: int) -> None:
        self.stream = stream
        self.chunk_bytes = chunk_bytes
        self.max_record_bytes = max_record_bytes
        self.data = b""
        self.pos = 0
        self.offset = 0
        self.num_lines = 0

    def fill(self) -> bool:
        """Read more, dropping the bytes before `pos`; return False at the end of the stream."""
        # Doubles what is held, so that a long record is moved a few times, not once per chunk.
        chunk = self.stream.read(max(self.chunk_bytes, self.num_ahead()))
        if not chunk:
            return False
        self.data = self.data[self.pos :] + chunk
        self.offset += self.pos
        self.pos = 0
        return True

    def num_ahead(self) -> int:
        return len(self.data) - self.pos

    def peek(self, length: int = 1) -> bytes:
        return self.data[self.pos : self.pos + length]

    def skip(self, pattern: re.Pattern[bytes]) -> bytes:
        """Skip the bytes that a pattern matches here, and return them."""
        match = pattern.match(self.data, self.pos)
        passed = match[0] if match else b""
        self.pos += len(passed)
        return passed

    def find_start(self) -> bool:
        """Skip a byte order mark and white space; return False if nothing follows."""
        while self.num_ahead() < len(_BOM) and self.fill():
            pass
        if self.peek(len(_BOM)) == _BOM:
            self.pos += len(_BOM)
        while True:
            self.num_lines += self.skip(_BLANK).count(b"\n")
            if self.num_ahead():
                return True
            if not self.fill():
                return False

    def take_lines(self) -> bytes | None:
        """Consume the complete lines in the window, or the rest at the end of the stream.

        Returns:
            The lines without the last line end; None if the next line is longer than the largest
            record.
        """
        while (end := self.data.rfind(b"\n", self.pos)) < 0:
            if self.num_ahead() > self.max_record_bytes:
                return None
            if not self.fill():
                end = len(self.data)
                break
        block = self.data[self.pos : end]
        self.pos = min(end + 1, len(self.data))
        return block

    def has_ended_line(self) -> bool:
        """Return whether the last consumed line had a line end."""
        return self.data[self.pos - 1 : self.pos] == b"\n"

    def skip_line(self) -> bytes:
        """Skip the line at `pos`, however long, and return its start."""
        start = self.data[self.pos :]
        while (end := self.data.find(b"\n", self.pos)) < 0:
            self.pos = len(self.data)
            if not self.fill():
                return start
        self.pos = end + 1
        return start

    def line_length(self) -> int:
        """Measure the line at `pos` with its line end; give up beyond the largest record."""
        while (end := self.data.find(b"\n", self.pos)) < 0:
            if self.num_ahead() > self.max_record_bytes or not self.fill():
                return self.num_ahead()
        return end + 1 - self.pos


def _holds_lines(view: _View, parse: _Parse) -> bool:
    """Return whether a file is JSON lines, by the first line or the start of the second.

    A first line longer than the largest record counts as a line, unless it begins with a complete
    object that is not.
    """
    if view.peek() == b"[":
        return False
    length = view.line_length()
    if length > view.max_record_bytes:
        end, depth = _scan(view.data, view.pos, 0)
        return depth != 0 or end - view.pos > view.max_record_bytes
    while view.num_ahead() <= length and view.fill():
        pass
    return view.peek(length + 1)[length:] == b"{" or parse(view.peek(length)) is not _BROKEN


def _lines(view: _View, path: str, report: Report, parse: _Parse) -> Iterator[tuple[str, Any]]:
    """Yield one value per line; a line that is not JSON is searched for objects."""
    number = view.num_lines
    while view.num_ahead() or view.fill():
        begin = view.offset + view.pos
        block = view.take_lines()
        if block is None:
            block = view.skip_line()
        num_passed = view.offset + view.pos - begin
        lines = block.split(b"\n")
        last = number + len(lines)
        for line in lines:
            number += 1
            where = f"{path} line {number}"
            if len(line) > view.max_record_bytes:
                detail = f"{num_passed} bytes, expected at most {view.max_record_bytes}"
                num_records = num_passed // view.max_record_bytes
                report(RecordIssue("too_large", where, detail, num_records))
                continue
            value = parse(line)
            if value is not _BROKEN:
                yield where, _unwrapped(value, where, report)
            elif line.strip():
                # A last line without a line end is truncated, even if it ends within a string.
                is_cut = number == last and not view.has_ended_line()
                whole = line if is_cut else line + b"\n"
                yield from _objects_of_line(whole, where, report, parse)


def _objects_of_line(
    line: bytes, where: str, report: Report, parse: _Parse
) -> Iterator[tuple[str, Any]]:
    """Yield the objects of a line that is not JSON as a whole, up to one that does not close.

    Nothing within an object is ever taken for a record.
    """
    at, depth = _after_separators(line, 0), 0
    while at < len(line) and depth == 0:
        end, depth = _scan(line, at, 0) if line.startswith(b"{", at) else (at, -1)
        value = parse(line[at:end]) if depth == 0 else _BROKEN
        if value is _BROKEN:
            reason: Reason = "truncated" if depth > 0 else _diagnose(line[at:])
            report(RecordIssue(reason, where, "the object cannot be read"))
        else:
            yield where, _unwrapped(value, where, report)
        at = _after_separators(line, end)
    if depth == 0 and line.lstrip().startswith(b"[") and not line.rstrip().endswith(b"]"):
        report(RecordIssue("truncated", where, "the array is not closed"))


def _after_separators(line: bytes, at: int) -> int:
    match = _SEPARATORS.match(line, at)
    return match.end() if match else at


class _Objects:
    """The objects of an array, or concatenated objects.

    The end of an object is found by its brackets. If that fails, the next object is searched for
    by the first key of the first object, as records of one file start alike. If they do not,
    objects may be skipped along with a broken one, which then counts as the number of records that
    would fit in the skipped bytes.
    """

    def __init__(
        self,
        view: _View,
        path: str,
        report: Report,
        parse: _Parse,
        keys: Collection[bytes] | None,
    ) -> None:
        self.view = view
        self.path = path
        self.report = report
        self.parse = parse
        self.keys = keys
        self.resyncs_left = MAX_RESYNCS
        self.last_length = 0
        self.num_given = 0
        self.given_bytes = 0
        self.start_alike = True
        self.start_is_sure = False
        self.scanned_bytes = 0
        self.rescanned_bytes = 0
        self.start_pattern: re.Pattern[bytes] | None = None

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        view = self.view
        is_array = view.find_start() and view.peek() == b"["
        is_closed = self._skip_separators()
        while view.num_ahead():
            where = self._where()
            value, measured = self._read_next()
            self._learn_start(is_whole=value is not _BROKEN)
            if value is not _BROKEN and isinstance(measured, int):
                view.pos += measured
                self.last_length = measured
                self.num_given += 1
                self.given_bytes += measured
                yield where, _unwrapped(value, where, self.report)
            elif not self._pass_over(measured, where):
                return
            is_closed = self._skip_separators()
        if is_array and not is_closed:
            self.report(RecordIssue("truncated", self._where(), "the array is not closed"))

    def _where(self) -> str:
        return f"{self.path} byte {self.view.offset + self.view.pos}"

    def _skip_separators(self) -> bool:
        """Go to the next object, and return whether an array was closed on the way."""
        is_closed = False
        while True:
            is_closed |= b"]" in self.view.skip(_SEPARATORS)
            if self.view.num_ahead() or not self.view.fill():
                return is_closed

    def _read_next(self) -> tuple[Any, int | Reason]:
        """Return the object at the read position and its length, or `_BROKEN` and the reason."""
        value, length = self._guess()
        if value is not _BROKEN:
            return value, length
        measured = self._measure()
        if isinstance(measured, int):
            value = self.parse(self.view.peek(measured))
        return value, measured

    def _guess(self) -> tuple[Any, int]:
        """Assume that the object ends where the next one seems to start, which is found faster.

        Correct whenever the bytes in between are an object. The search is limited to about four
        times the length of the previous object, for files whose objects do not start alike.
        """
        view = self.view
        stop = view.pos + 4 * self.last_length + _OVERLAP_BYTES
        pattern = self.start_pattern
        match = pattern.search(view.data, view.pos + 1, stop) if pattern else None
        if match is None or view.peek() != b"{":
            return _BROKEN, 0
        body = view.data[view.pos : match.start(1)].rstrip(b" \t\r\n,")
        return (_BROKEN if len(body) > view.max_record_bytes else self.parse(body)), len(body)

    def _measure(self) -> int | Reason:
        """Return the length of the object at the read position, or the reason why it has none."""
        view = self.view
        depth = length = self.scanned_bytes = 0
        if view.peek() != b"{":
            return "invalid_json"
        while True:
            end, depth = _scan(view.data, view.pos + length, depth)
            length = end - view.pos
            self.scanned_bytes = view.num_ahead() if depth > 0 else length
            if self.scanned_bytes > view.max_record_bytes:
                return "too_large"
            if depth < 0:
                return "invalid_json"
            if depth == 0:
                return length
            if not view.fill():
                return "truncated"

    def _learn_start(self, *, is_whole: bool) -> None:
        """Learn the first key of the first object, and check that this object starts alike.

        A broken object teaches it only if the key is a field of the record type, and only until
        there is a whole object.
        """
        view = self.view
        if self.start_pattern is not None and (self.start_is_sure or not is_whole):
            self.start_alike &= self.start_pattern.match(view.data, view.pos) is not None
            return
        match = _FIRST_KEY.match(view.data, view.pos)
        if match and (is_whole or self.keys is None or match[1] in self.keys):
            self.start_pattern = re.compile(rb"(\{)\s*+%b\s*+:" % re.escape(match[1]))
            self.start_is_sure = is_whole

    def _pass_over(self, measured: int | Reason, where: str) -> bool:
        """Report and skip the broken object at the read position; False if nothing follows."""
        begin = self.view.offset + self.view.pos
        if isinstance(measured, str):
            reason, found = measured, self._find_start()
        else:
            reason, found = _diagnose(self.view.peek(measured)), self._find_start_within(measured)
        num_passed = self.view.offset + self.view.pos - begin
        num_records = self._num_records(num_passed)
        rest = "" if found else "; no other object after it"
        if num_records > 1:
            rest += f"; {num_passed} bytes are skipped, enough for {num_records} records"
        self.report(RecordIssue(reason, where, f"the object cannot be read{rest}", num_records))
        if found and self._is_lost():
            self._give_up(self._where(), "too many broken records before it: all bytes from here")
            return False
        # Anything longer is more than one object cut off by the end of the file.
        most = max(4 * self.last_length, CHUNK_BYTES) if self.num_given else 0
        if not found and num_passed > most:
            what = f"no further object starts like the first: the last {num_passed} bytes"
            self._give_up(where, what)
        return found

    def _give_up(self, where: str, what: str) -> None:
        self.report(RecordIssue("too_many_broken", where, f"{what} are skipped"))

    def _num_records(self, num_passed: int) -> int:
        """Return how many records may be lost in the skipped bytes.

        It is 1 if all objects start alike.
        """
        if self.start_alike and self.num_given > 1:
            return 1
        length = self.given_bytes // self.num_given if self.num_given else _UNKNOWN_LENGTH
        return max(1, num_passed // max(length, 1))

    def _is_lost(self) -> bool:
        """Return whether going on costs too much, as each resync scans some bytes again."""
        view = self.view
        largest_bytes = min(view.max_record_bytes, MAX_RECORD_BYTES)
        allowed_bytes = view.offset + view.pos + _NUM_RESCANNED * largest_bytes
        return self.resyncs_left < 0 or self.rescanned_bytes > allowed_bytes

    def _count_resync(self) -> None:
        self.resyncs_left -= 1
        self.rescanned_bytes += self.scanned_bytes

    def _find_start(self) -> bool:
        """Search for another object anywhere after the read position."""
        view = self.view
        self._count_resync()
        view.pos += 1
        while True:
            if (start := self._next_start(view.pos)) is not None:
                view.pos = start
                return True
            view.pos = max(view.pos, len(view.data) - _OVERLAP_BYTES)
            if not view.fill():
                return False

    def _find_start_within(self, length: int) -> bool:
        """Search for another object within one: a missing quotation mark can merge several."""
        view = self.view
        start = self._next_start(view.pos + 1, view.pos + length)
        if start is not None:
            self._count_resync()
        view.pos = view.pos + length if start is None else start
        return True

    def _next_start(self, begin: int, end: int | None = None) -> int | None:
        """Return the likely start of an object that is no value of a key and no start of a list."""
        data = self.view.data
        stop = len(data) if end is None else end
        for match in (self.start_pattern or _LINE_START).finditer(data, begin, stop):
            start = match.start(1)
            before = data[max(0, start - _LOOK_BACK_BYTES) : start].rstrip()
            if not before.endswith((b":", b"[")):
                return start
        return None


def _scan(data: bytes, at: int, depth: int) -> tuple[int, int]:
    """Go from bracket to bracket until the object closes or the data ends.

    Returns:
        The position reached, and the depth there: 0 for closed, -1 for broken.
    """
    while match := _TO_BRACKET.match(data, at):
        at = match.end()
        last = data[at - 1]
        if last in b"{[":
            depth += 1
            if depth > _MAX_DEPTH:
                return at, -1
        elif last == _LINE_END:
            return at, -1
        else:
            depth -= 1
            if depth == 0:
                return at, 0
    return at, depth


def _parser(kind: Any) -> _Parse:
    """Return a function that parses JSON: a value, or a `RecordError` or `_BROKEN` if it fails.

    The error stands for JSON that is not of this kind. A repaired value is in a `_Repaired`.
    """
    decode = msgspec.json.Decoder(kind).decode

    def parse(text: bytes) -> Any:
        value = _decoded(decode, text)
        if value is _BROKEN and _NOT_JSON.search(text):
            repaired, detail = _repair(text)
            value = _decoded(decode, repaired) if detail else _BROKEN
            return value if value is _BROKEN else _Repaired(value, detail)
        return value

    return parse


def _decoded(decode: Callable[[bytes], Any], text: bytes) -> Any:
    try:
        return decode(text)
    except msgspec.ValidationError as error:
        # msgspec raises it before it has parsed the rest of the text.
        return RecordError.of(error) if _is_json(text) else _BROKEN
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _BROKEN


class _Repaired(msgspec.Struct, frozen=True, gc=False):
    """A value, and the changes made to its text."""

    value: Any
    detail: str


def _unwrapped(value: Any, where: str, report: Report) -> Any:
    """Return a value, after reporting the changes made to its text."""
    if isinstance(value, _Repaired):
        report(RecordIssue("repaired", where, value.detail))
        return value.value
    return value


_STRING_OR_CONSTANT = re.compile(rb'%b"|-?Infinity|NaN' % _OPEN_STRING)
_SURROGATES = re.compile(
    rb"(\\[^u]|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    rb"|\\u[dD][89a-fA-F][0-9a-fA-F]{2}"
)


def _repair(text: bytes) -> tuple[bytes, str]:
    """Replace what some JSON writers write but JSON does not allow.

    Returns:
        The text, and a description of the changes; empty if there were none.
    """
    num_halves, constants = 0, set[str]()

    def replace_half(found: re.Match[bytes]) -> bytes:
        nonlocal num_halves
        if found[1] is not None:
            return found[1]
        num_halves += 1
        return rb"\ufffd"

    def replace(found: re.Match[bytes]) -> bytes:
        if not found[0].startswith(b'"'):
            constants.add(found[0].decode())
            return b"null"
        return _SURROGATES.sub(replace_half, found[0]) if b"\\u" in found[0] else found[0]

    repaired = _STRING_OR_CONSTANT.sub(replace, text)
    changes = [f"{name} is read as null" for name in sorted(constants)]
    if num_halves:
        changes.append(f"{num_halves} halves of surrogate pairs are read as U+FFFD")
    return repaired, ", ".join(changes)


def _keys(kind: Any) -> Collection[bytes] | None:
    """Return the keys of a declared kind as they are written, or None if any key is accepted."""
    names = getattr(kind, "__struct_encode_fields__", None)
    return None if names is None else [f'"{name}"'.encode() for name in names]


def _is_json(text: bytes) -> bool:
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


def _diagnose(text: bytes) -> Reason:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return "invalid_utf8"
    return "invalid_json"
