"""Arrow IPC files and streams (also called Feather), read record batch by record batch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import pyarrow as pa

from rayreward import storage
from rayreward.formats.base import Damaged, Piece, Scan, decoding

_FILE_MAGIC = b"ARROW1"
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


class ArrowIpc:
    """Arrow IPC, in the file or the stream layout; which one is told from the first bytes."""

    name = "arrow"
    title = "Arrow IPC"

    def scan(self, path: str) -> Scan:
        with decoding("the file"), storage.mapped(path) as source:
            schema, batches = _open(source)
            pieces = (Piece(batch.num_rows, at) for at, batch in enumerate(batches))
            return Scan(schema, tuple(pieces))

    def read(self, path: str, piece: Piece, schema: pa.Schema) -> pa.Table:
        with decoding(f"record batch {piece.at}"), storage.mapped(path) as source:
            for batch in _open(source, piece.at)[1]:
                return pa.Table.from_batches([batch]).slice(piece.skip, piece.rows)
        raise Damaged(f"record batch {piece.at} is not there")


def _open(source: pa.NativeFile, first: int = 0) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """The schema and the record batches from `first` on, read from mapped memory."""
    is_file = source.read(len(_FILE_MAGIC)) == _FILE_MAGIC
    source.seek(0)
    if is_file:
        file = pa.ipc.open_file(source)
        return file.schema, (file.get_batch(i) for i in range(first, file.num_record_batches))
    stream = pa.ipc.open_stream(source)
    return stream.schema, islice(_to_the_end(stream, source), first, None)


def _to_the_end(
    stream: pa.RecordBatchStreamReader, source: pa.NativeFile
) -> Iterator[pa.RecordBatch]:
    """The batches of a stream, which must have an end.

    The layout lets a stream end without a word, but then one cut off between two batches, or
    still being written, can't be told from a whole one. What follows the end is never read.
    """
    yield from stream
    read = source.tell()
    source.seek(max(read - len(_END_OF_STREAM), 0))
    if source.read(len(_END_OF_STREAM)) != _END_OF_STREAM:
        raise Damaged("the stream has no end marker")
    if read != source.size():
        raise Damaged(f"the stream ends after {read} of {source.size()} bytes")
