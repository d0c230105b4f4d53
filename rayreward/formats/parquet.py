"""Parquet files, read row group by row group."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from rayreward import storage
from rayreward.formats.base import Damaged, Piece, Scan, cut, decoding


class Parquet:
    """Apache Parquet."""

    name = "parquet"
    title = "Parquet"

    def scan(self, path: str) -> Scan:
        with decoding("the footer"), _open(path) as file:
            rows = sum(_group_rows(file))
            if rows != file.metadata.num_rows:
                raise Damaged(f"{file.metadata.num_rows} rows by its footer, {rows} by its groups")
            return Scan(file.schema_arrow, rows)

    def split(self, path: str, rows_per_piece: int) -> Iterator[Piece]:
        with decoding("the footer"), _open(path) as file:
            groups = _group_rows(file)
        for group, rows in enumerate(groups):
            yield from cut(rows, group, rows_per_piece)

    def read(self, path: str, piece: Piece, schema: pa.Schema) -> pa.Table:
        with decoding(f"row group {piece.at}"), _open(path) as file:
            return file.read_row_group(piece.at).slice(piece.skip, piece.rows)


def _open(path: str) -> pq.ParquetFile:
    return pq.ParquetFile(storage.source(path), page_checksum_verification=True)


def _group_rows(file: pq.ParquetFile) -> list[int]:
    metadata = file.metadata
    return [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
