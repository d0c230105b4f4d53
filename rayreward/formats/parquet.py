"""Parquet files, read row group by row group."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from rayreward.errors import DataError
from rayreward.formats.base import Damaged, Piece, Scan, cut


class Parquet:
    """Apache Parquet."""

    name = "parquet"

    def scan(self, path: str) -> Scan:
        with _open(path) as file:
            return Scan(file.schema_arrow, file.metadata.num_rows)

    def split(self, path: str, rows_per_piece: int) -> Iterator[Piece]:
        with _open(path) as file:
            metadata = file.metadata
            groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        for group, rows in enumerate(groups):
            yield from cut(rows, group, rows_per_piece)

    def read(self, path: str, piece: Piece, schema: pa.Schema) -> pa.Table:
        try:
            with _open(path) as file:
                group = file.read_row_group(piece.at)
        except (pa.ArrowException, OSError) as error:
            # pyarrow reports a page that does not decompress as an OSError without errno
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise Damaged(f"row group {piece.at} can't be decoded: {error}") from error
        return group.slice(piece.skip, piece.rows)


def _open(path: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except pa.ArrowException as error:
        raise DataError(
            f"{path} is not a readable Parquet file ({error}). It may be cut off or still being "
            "written: copy it again, or leave it out of the dataset."
        ) from error
