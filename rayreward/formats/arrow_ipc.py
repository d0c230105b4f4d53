"""Arrow IPC files and streams (also called Feather), read record batch by record batch."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from rayreward.errors import DataError
from rayreward.formats.base import Damaged, Piece, Scan, cut

_FILE_MAGIC = b"ARROW1"


class ArrowIpc:
    """Arrow IPC, in the file or the stream layout; which one is told from the first bytes."""

    name = "arrow"

    def scan(self, path: str) -> Scan:
        with pa.memory_map(path) as source:
            schema, batches = _open(path, source)
            try:
                return Scan(schema, sum(batch.num_rows for batch in batches))
            except (pa.ArrowException, OSError) as error:
                raise DataError(_unreadable(path, error)) from error

    def split(self, path: str, rows_per_piece: int) -> Iterator[Piece]:
        with pa.memory_map(path) as source:
            for index, batch in enumerate(_open(path, source)[1]):
                yield from cut(batch.num_rows, index, rows_per_piece)

    def read(self, path: str, piece: Piece, schema: pa.Schema) -> pa.Table:
        try:
            with pa.memory_map(path) as source:
                found, batches = _open(path, source)
                batch = next(batch for index, batch in enumerate(batches) if index == piece.at)
                return pa.Table.from_batches([batch], found).slice(piece.skip, piece.rows)
        except (pa.ArrowException, StopIteration) as error:
            raise Damaged(f"record batch {piece.at} can't be decoded: {error}") from error


def _open(path: str, source: pa.NativeFile) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """The schema and the record batches, read one after the other from mapped memory."""
    is_file = source.read(len(_FILE_MAGIC)) == _FILE_MAGIC
    source.seek(0)
    try:
        if is_file:
            file = pa.ipc.open_file(source)
            return file.schema, (file.get_batch(i) for i in range(file.num_record_batches))
        stream = pa.ipc.open_stream(source)
        return stream.schema, iter(stream)
    except (pa.ArrowException, OSError) as error:
        raise DataError(_unreadable(path, error)) from error


def _unreadable(path: str, error: Exception) -> str:
    return (
        f"{path} is not a readable Arrow IPC file or stream ({error}). It may be cut off or still "
        "being written: copy it again, or leave it out of the dataset."
    )
