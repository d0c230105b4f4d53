"""What a file format has to answer: of which schema the rows are, where they lie, and the rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa


class Damaged(ValueError):
    """A part of a file can't be decoded."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive rows of one file, addressed so that they can be read without the rest.

    Attributes:
        rows: How many.
        at: Where to start: a row group, a record batch or a byte offset, as the format counts.
        skip: Rows to pass over from there.
    """

    rows: int
    at: int
    skip: int = 0

    def slice(self, start: int, rows: int) -> Piece:
        """`rows` of its rows, from the one numbered `start` within it."""
        return Piece(rows, self.at, self.skip + start)


@dataclass(frozen=True, slots=True)
class Scan:
    """What a whole file holds: the schema, and all rows as pieces, in order."""

    schema: pa.Schema
    pieces: tuple[Piece, ...]

    @property
    def rows(self) -> int:
        """Rows of the whole file."""
        return sum(piece.rows for piece in self.pieces)


class Format(Protocol):
    """One file format.

    Attributes:
        name: What plans call it.
        title: What people call it.
    """

    name: str
    title: str

    def scan(self, path: str) -> Scan:
        """Reads the schema and finds where the rows lie, opening the file once.

        Raises:
            Damaged: The file is not in this format, or is cut off.
            DataError: The same, where more can be said: which line it is.
            OSError: The file can't be read at all.
        """
        ...

    def read(self, path: str, piece: Piece, schema: pa.Schema) -> pa.Table:
        """Reads a piece.

        Args:
            path: The file.
            piece: From `scan`, or a slice of one.
            schema: The dataset's schema, for formats that carry none.

        Raises:
            Damaged: The bytes of this piece can't be decoded; other pieces may be fine.
            OSError: The file can't be read at all.
        """
        ...


@contextmanager
def decoding(what: str) -> Iterator[None]:
    """Tells bytes that can't be decoded from a file that can't be read.

    pyarrow reports a page that does not decompress as an OSError too, but one without a number.

    Raises:
        Damaged: Whatever is read in here can't be decoded.
    """
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = str(error).strip().rstrip(".")
        raise Damaged(f"{what} can't be decoded ({reason})") from error


def window(batches: Iterable[pa.RecordBatch], skip: int, rows: int) -> Iterator[pa.RecordBatch]:
    """`rows` rows from a run of batches, after `skip`; takes no more batches than that needs."""
    for batch in batches:
        first, last = max(skip, 0), min(skip + rows, batch.num_rows)
        if first < last:
            yield batch.slice(first, last - first)
        skip -= batch.num_rows
        if skip + rows <= 0:
            return
