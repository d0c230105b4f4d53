"""What a file format has to answer: how many rows, of which schema, cut where, and the rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa


class Damaged(ValueError):
    """A part of a file can't be decoded."""


@dataclass(frozen=True, slots=True)
class Scan:
    """What a whole file holds."""

    schema: pa.Schema
    rows: int


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


class Format(Protocol):
    """One file format.

    Attributes:
        name: What plans call it.
        title: What people call it.
    """

    name: str
    title: str

    def scan(self, path: str) -> Scan:
        """Reads the schema and counts the rows.

        Raises:
            Damaged: The file is not in this format, or is cut off.
            DataError: The same, where more can be said: which line it is.
            OSError: The file can't be read at all.
        """
        ...

    def split(self, path: str, rows_per_piece: int) -> Iterator[Piece]:
        """Cuts the file into pieces of at most so many rows, in order, without reading them.

        Raises:
            Damaged: As in `scan`.
            OSError: As in `scan`.
        """
        ...

    def read(self, path: str, piece: Piece, schema: pa.Schema) -> pa.Table:
        """Reads a piece.

        Args:
            path: The file.
            piece: From `split`.
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


def cut(rows: int, at: int, rows_per_piece: int) -> Iterator[Piece]:
    """Cuts one row group or record batch into pieces."""
    for start in range(0, rows, rows_per_piece):
        yield Piece(min(rows_per_piece, rows - start), at, start)
