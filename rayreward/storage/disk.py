"""This machine's files."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rayreward.storage.base import Stat


class Disk:
    """This machine's files, and what is mounted among them."""

    def stat(self, name: str) -> Stat:
        found = os.stat(name)
        return Stat(found.st_size, found.st_mtime_ns)

    def open(self, name: str) -> io.BufferedReader:
        return open(name, "rb")

    def read(self, name: str) -> bytes:
        return Path(name).read_bytes()

    def exists(self, name: str) -> bool:
        return os.path.exists(name)

    def occupied(self, name: str, *, apart_from: str) -> bool:
        if not os.path.isdir(name):
            return os.path.exists(name)
        return any(found != apart_from for found in os.listdir(name))

    def sizes(self, name: str) -> dict[str, int]:
        if not os.path.isdir(name):
            return {}
        with os.scandir(name) as found:
            return {file.name: file.stat().st_size for file in found if file.is_file()}

    @contextmanager
    def writing(self, name: str) -> Iterator[io.BufferedIOBase]:
        try:
            with open(name, "w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            self._try_to_remove(name)
            raise

    def write(self, name: str, text: str) -> None:
        scratch = name + ".tmp"
        with open(scratch, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, name)

    def publish(self, source: str, name: str) -> None:
        os.replace(source, name)

    def remove(self, name: str) -> None:
        Path(name).unlink(missing_ok=True)

    def make_directory(self, name: str) -> None:
        os.makedirs(name, exist_ok=True)

    def remove_directory(self, name: str) -> None:
        if os.path.exists(name):
            shutil.rmtree(name)

    def lines(self, name: str) -> list[bytes]:
        return self.read(name).splitlines() if os.path.exists(name) else []

    def add_line(self, name: str, key: str, line: str) -> None:
        with open(name, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def keep_lines(self, name: str, lines: Mapping[str, str]) -> None:
        # written anew, since a run that was killed may have left half a line
        self.write(name, "".join(line + "\n" for line in lines.values()))

    def _try_to_remove(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(name)
