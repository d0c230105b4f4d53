"""What a file format has to answer: how many rows, of which schema, cut where, and the rows."""

from __future__ import annotations

from collections.abc import Iterator
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
    """One file format."""

    name: str

    def scan(self, path: str) -> Scan:
        """Reads the schema and counts the rows.

        Raises:
            DataError: The file is not in this format.
        """
        ...

    def split(self, path: str, rows_per_piece: int) -> Iterator[Piece]:
        """Cuts the file into pieces of at most so many rows, in order, without reading them."""
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


def cut(rows: int, at: int, rows_per_piece: int) -> Iterator[Piece]:
    """Cuts one row group or record batch into pieces."""
    for start in range(0, rows, rows_per_piece):
        yield Piece(min(rows_per_piece, rows - start), at, start)
