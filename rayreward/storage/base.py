"""What a run needs of the place where its files lie, and by what a file is known again."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Stat:
    """By which a file is known again.

    Attributes:
        size_bytes: How long it is.
        mtime_ns: When it was changed last; 0 where the etag tells.
        etag: The store's own mark of this content, where it has one.
    """

    size_bytes: int
    mtime_ns: int
    etag: str | None = None


class Storage(Protocol):
    """What a run needs of the place where its files lie. All methods raise OSError."""

    def stat(self, name: str) -> Stat:
        """Size and version of a file."""
        ...

    def open(self, name: str) -> io.BufferedReader:
        """Opens a file for reading from any place in it."""
        ...

    def read(self, name: str) -> bytes:
        """All of a file."""
        ...

    def exists(self, name: str) -> bool:
        """Whether a file is there."""
        ...

    def occupied(self, name: str, *, apart_from: str) -> bool:
        """Whether a file is there, or a directory with anything in it but for what is named so."""
        ...

    def sizes(self, name: str) -> dict[str, int]:
        """The files in a directory, not below: last part of the name to bytes."""
        ...

    def writing(self, name: str) -> AbstractContextManager[io.BufferedIOBase]:
        """A new file to write and read back; durable once this ends well."""
        ...

    def write(self, name: str, text: str) -> None:
        """Writes a file so that it is there whole, for good, or not at all."""
        ...

    def publish(self, source: str, name: str) -> None:
        """Gives a written file its final name, whole or not at all. The old one may stay."""
        ...

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        ...

    def make_directory(self, name: str) -> None:
        """Makes a directory and those above, where the storage has such."""
        ...

    def remove_directory(self, name: str) -> None:
        """Removes a directory with all that is in it, if it is there."""
        ...

    def lines(self, name: str) -> list[bytes]:
        """The lines of a ledger, the last one perhaps torn; none if there is no ledger."""
        ...

    def add_line(self, name: str, key: str, line: str) -> None:
        """Adds a line to a ledger, durably.

        Args:
            name: The ledger.
            key: Of the line. Where files can't grow, it is an object of its own by this name.
            line: Without its end.
        """
        ...

    def keep_lines(self, name: str, lines: Mapping[str, str]) -> None:
        """Leaves just these lines in a ledger, by their keys; they are there already."""
        ...
