"""One JSON array as a whole file, pretty or not: its items, from any of them on.

Only where an item ends is found here; whether it is a JSON object is for whoever parses it.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator

import pyarrow as pa

_CHUNK_BYTES = 2**20

_NOT_BLANK = re.compile(rb"[^ \t\r\n]")
_TOKEN = re.compile(rb'"[^"\\\r\n]*+(?:\\[^\r\n][^"\\\r\n]*+)*+(?P<closed>"?)|[\[\]{}]')
_PLAIN = re.compile(rb"[^\s,\[\]{}\"]+")
_ON_ONE_LINE = bytes.maketrans(b"\r\n", b"  ")


def begins_array(file: io.BufferedReader, at: int = 0) -> bool:
    """Whether a file is an array, by what comes next at a place where `items` may begin."""
    text = file.peek(1).removeprefix(codecs.BOM_UTF8).lstrip()
    return text.startswith(b"," if at else b"[")


def items(file: io.BufferedReader, at: int = 0) -> Iterator[tuple[int, bytes]]:
    """The items of an array, each on one line, and where to begin in order to begin with it.

    Args:
        file: At that place.
        at: Where to begin: 0, or what came with an item.

    Raises:
        pyarrow.ArrowInvalid: It is no array, or is cut off.
    """
    text = _Text(file, at)
    text.skip(codecs.BOM_UTF8)
    text.take(b"," if at else b"[")
    if at or text.mark() != b"]":
        yield at, text.take_value()
        while text.mark() != b"]":
            at = text.at
            text.take(b",")
            yield at, text.take_value()
    text.take(b"]")
    if text.mark():
        raise text.wrong("more after the array's end")


class _Text:
    """What has been read of a file and not been taken yet."""

    def __init__(self, file: io.BufferedReader, at: int) -> None:
        self._file, self._read, self._start, self._place = file, b"", at, 0

    @property
    def at(self) -> int:
        """Which byte of the file comes next."""
        return self._start + self._place

    def mark(self) -> bytes:
        """The next byte that is not blank, or nothing at the end; blanks before it are gone."""
        while not (found := _NOT_BLANK.search(self._read, self._place)):
            self._place = len(self._read)
            if not self._more():
                return b""
        self._place = found.start()
        return found[0]

    def skip(self, begin: bytes) -> None:
        """Passes over what the file may begin with."""
        self.mark()
        if self._read.startswith(begin):
            self._place = len(begin)

    def take(self, mark: bytes) -> None:
        if self.mark() != mark:
            raise self.wrong(f"no {mark.decode()!r}")
        self._place += 1

    def take_value(self) -> bytes:
        if self.mark() in b",:]}":
            raise self.wrong("no value")
        while (end := self._find_end()) is None:
            if not self._more():
                raise self.wrong("a value without an end")
        value = self._read[self._place : end]
        self._place = end
        return value.translate(_ON_ONE_LINE)

    def _find_end(self) -> int | None:
        """Where the value at this place ends, or null if that is not read yet."""
        if plain := _PLAIN.match(self._read, self._place):
            return plain.end() if plain.end() < len(self._read) else None
        depth = 0
        for token in _TOKEN.finditer(self._read, self._place):
            if token[0] in b"[{":
                depth += 1
            elif token[0] in b"]}":
                depth -= 1
            elif not token["closed"]:
                if token.end() < len(self._read) - 1:
                    raise self.wrong("a value with a text without an end")
                return None
            if depth <= 0:
                return token.end()
        return None

    def _more(self) -> bool:
        rest = self._read[self._place :]
        chunk = self._file.read(max(_CHUNK_BYTES, len(rest)))
        self._read, self._start, self._place = rest + chunk, self.at, 0
        return bool(chunk)

    def wrong(self, what: str) -> pa.ArrowInvalid:
        return pa.ArrowInvalid(f"{what} at byte {self.at} of the array")
