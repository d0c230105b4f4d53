"""An object store, seen through pyarrow's or fsspec's filesystems."""

from __future__ import annotations

import contextlib
import errno
import io
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import pyarrow.fs as pafs

from rayreward.storage.base import Stat
from rayreward.storage.failures import no_bucket, told
from rayreward.storage.urls import STORES, base_of, parse, reached

_T = TypeVar("_T")

_READ_BYTES = 4 * 2**20
"""Fetched at once by readers that go from line to line."""


class Objects:
    """An object store, or what fsspec makes look like one: no rename, no append.

    An object is there whole or not at all, so a write is durable and atomic by itself; publishing
    is a copy within the store; and a ledger is a prefix with one object a line.
    """

    def __init__(
        self, scheme: str, files: pafs.FileSystem, retry: Callable[[Callable[[], Any]], Any]
    ) -> None:
        """Wraps a filesystem.

        Args:
            scheme: What its URLs begin with.
            files: Where they lie; of pyarrow, or of fsspec in pyarrow's wrapping.
            retry: Calls a function until it does not fail in passing.
        """
        self._scheme, self._files, self._retry = scheme, files, retry
        self._spec: Any = files.handler.fs if isinstance(files, pafs.PyFileSystem) else None

    def stat(self, name: str) -> Stat:
        return self._open(name)[0]

    def open(self, name: str) -> io.BufferedReader:
        return io.BufferedReader(self.ranges(name), _READ_BYTES)

    def ranges(self, name: str) -> io.RawIOBase:
        """Opens a file of which each read is a request for just that."""
        stat, fetch = self._open(name)

        def asked(start: int, length: int) -> bytes:
            return self._do(name, lambda: fetch(start, length))

        return _Ranges(stat.size_bytes, asked)

    def read(self, name: str) -> bytes:
        def read() -> bytes:
            with self._files.open_input_stream(self._path(name), compression=None) as file:
                content: bytes = file.read()
                return content

        return self._do(name, read)

    def exists(self, name: str) -> bool:
        try:
            if self._spec is not None:
                kind: str = self._do(name, lambda: self._spec.info(self._path(name)))["type"]
                return kind == "file"
            info = self._do(name, lambda: self._files.get_file_info(self._path(name)))
            return info.type is pafs.FileType.File
        except FileNotFoundError:
            return False

    def occupied(self, name: str, *, apart_from: str) -> bool:
        infos = self._infos(name, deep=False)
        return self.exists(name) or any(info.base_name != apart_from for info in infos)

    def sizes(self, name: str) -> dict[str, int]:
        infos = self._infos(name, deep=False)
        return {info.base_name: info.size for info in infos if info.type is pafs.FileType.File}

    def files_below(self, name: str) -> list[str]:
        """All files below a directory, by their paths from there, in order."""
        if self._scheme in ("http", "https"):
            return []  # what a page links to is no directory
        start = len(self._path(name)) + 1
        infos = self._infos(name, deep=True)
        # a marker that stands for an empty directory has a name that ends in a slash
        return sorted(
            path
            for path in (info.path[start:] for info in infos if info.type is pafs.FileType.File)
            if path and not path.endswith("/")
        )

    def glob(self, pattern: str) -> list[str]:
        """Names of the files that match a pattern, in order; as in a shell, hidden ones don't."""
        from fsspec.utils import glob_translate

        base = base_of(pattern)
        if base == pattern:
            return []
        matches = self._do(pattern, lambda: re.compile(glob_translate(pattern[len(base) + 1 :])))
        return [
            f"{base}/{path}"
            for path in self.files_below(base)
            if matches.match(path) and not any(part.startswith(".") for part in path.split("/"))
        ]

    @contextmanager
    def writing(self, name: str) -> Iterator[io.BufferedIOBase]:
        buffer = io.BytesIO()
        yield buffer
        self._put(name, buffer.getvalue())

    def write(self, name: str, text: str) -> None:
        self._put(name, text.encode())

    def publish(self, source: str, name: str) -> None:
        self._do(source, lambda: self._files.copy_file(self._path(source), self._path(name)))

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._do(name, lambda: self._files.delete_file(self._path(name)))

    def make_directory(self, name: str) -> None:
        pass

    def remove_directory(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._do(name, lambda: self._files.delete_dir(self._path(name)))

    def lines(self, name: str) -> list[bytes]:
        keys = sorted(self.sizes(_entries(name)))
        with ThreadPoolExecutor(16) as threads:
            return list(threads.map(lambda key: self.read(f"{_entries(name)}/{key}"), keys))

    def add_line(self, name: str, key: str, line: str) -> None:
        self.write(f"{_entries(name)}/{key}.json", line)

    def keep_lines(self, name: str, lines: Mapping[str, str]) -> None:
        for entry in self.sizes(_entries(name)).keys() - {f"{key}.json" for key in lines}:
            self.remove(f"{_entries(name)}/{entry}")

    def _open(self, name: str) -> tuple[Stat, Callable[[int, int], bytes]]:
        """What a file is, and how to fetch bytes of it by start and length."""
        path = self._path(name)
        if self._spec is not None:
            info = self._do(name, lambda: self._spec.info(path))
            if info["type"] != "file":
                raise IsADirectoryError(errno.EISDIR, "it is a directory")
            if info.get("size") is None:  # a page that is made as it is sent
                content = self._do(name, lambda: self._spec.cat_file(path))
                return Stat(len(content), 0, _etag(info)), lambda at, n: content[at : at + n]
            return (
                Stat(info["size"], 0, _etag(info)),
                lambda at, length: self._spec.cat_file(path, at, at + length),
            )
        file = self._do(name, lambda: self._files.open_input_file(path))
        size = self._do(name, file.size)
        metadata = self._do(name, file.metadata) or {}
        etag = metadata.get("ETag") or metadata.get("generation")  # of S3, of Google's
        if etag is not None:
            return Stat(size, 0, etag.decode()), lambda at, length: file.read_at(length, at)
        info = self._do(name, lambda: self._files.get_file_info(path))
        return Stat(size, info.mtime_ns or 0), lambda at, length: file.read_at(length, at)

    def _infos(self, name: str, *, deep: bool) -> list[pafs.FileInfo]:
        selector = pafs.FileSelector(self._path(name), recursive=deep, allow_not_found=True)
        found: list[pafs.FileInfo] = self._do(name, lambda: self._files.get_file_info(selector))
        if not found and self._scheme in STORES and not self._has_bucket(name):
            # a listing is just empty then, and a write would be the first to tell
            raise FileNotFoundError(errno.ENOENT, no_bucket(name))
        return found

    def _has_bucket(self, name: str) -> bool:
        bucket = self._do(name, lambda: self._files.get_file_info(parse(name).bucket))
        return bucket.type is not pafs.FileType.NotFound

    def _put(self, name: str, content: bytes) -> None:
        def put() -> None:
            with self._files.open_output_stream(self._path(name), compression=None) as file:
                file.write(content)

        self._do(name, put)

    def _path(self, name: str) -> str:
        if self._spec is not None:
            return str(self._spec._strip_protocol(reached(name)))
        return parse(name).place

    def _do(self, name: str, work: Callable[[], _T]) -> _T:
        try:
            result: _T = self._retry(work)
            return result
        except Exception as error:  # each library has errors of its own
            raise told(error, name) from None  # and they quote URLs with all that is in them


class _Ranges(io.RawIOBase):
    """A file read by asking for ranges of it."""

    def __init__(self, size: int, fetch: Callable[[int, int], bytes]) -> None:
        self._size, self._fetch, self._at = size, fetch, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        start, wanted = self._at, max(0, min(len(buffer), self._size - self._at))
        if not wanted:
            return 0
        content = self._fetch(start, wanted)
        if len(content) == self._size > wanted:  # a web server that knows no ranges sends it all
            whole = content
            self._fetch = lambda at, length: whole[at : at + length]
            content = self._fetch(start, wanted)
        if len(content) != wanted:
            raise OSError(
                errno.EIO,
                f"{len(content):,} bytes came where {wanted:,} were asked for. The file may have "
                "changed: plan the job again",
            )
        buffer[:wanted] = content
        self._at += wanted
        return wanted


def _entries(ledger: str) -> str:
    """Where the lines of a ledger are objects of their own."""
    return ledger.removesuffix(".jsonl")


def _etag(info: Mapping[str, Any]) -> str | None:
    """What one of fsspec's filesystems knows a content by; each has its own word for it."""
    marks = ("ETag", "etag", "blob_id", "Content-MD5", "mtime", "LastModified", "last_modified")
    return next(
        (
            str(info[mark])
            for mark in (*marks, "Last-Modified", "updated", "created")
            if mark in info
        ),
        None,
    )
