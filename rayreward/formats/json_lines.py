"""JSON Lines, plain or compressed: one object a line, blank lines passed over.

The schema is found by parsing the whole file once, block by block, so that a column means the
same in every shard. Dates stay the text that they are.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import IO, cast

import pyarrow as pa
import pyarrow.json as pj

from rayreward.errors import DataError
from rayreward.formats.base import Damaged, Piece, Scan

_BLOCK_BYTES = 16 * 2**20


class JsonLines:
    """JSON Lines, decompressed by file extension."""

    name = "json"

    def scan(self, path: str) -> Scan:
        schema, rows = pa.schema([]), 0
        first_line = 1
        for lines in _blocks(path):
            table = _parse_or_locate(path, lines, first_line)
            try:
                schema = pa.unify_schemas(
                    [schema, _as_text(table.schema)], promote_options="permissive"
                )
            except pa.ArrowException as error:
                raise DataError(
                    f"{path}: a column changes its type between lines before and after line "
                    f"{first_line} ({error}). Give each column one type."
                ) from error
            rows += table.num_rows
            first_line += len(lines)
        return Scan(schema, rows)

    def split(self, path: str, rows_per_piece: int) -> Iterator[Piece]:
        start, rows, offset = 0, 0, 0
        seekable = not _compressed(path)
        begun = 0
        with _open(path) as file:
            for line in file:
                if line.strip():
                    if rows == 0:
                        begun = offset
                    rows += 1
                offset += len(line)
                if rows == rows_per_piece:
                    yield Piece(rows, begun) if seekable else Piece(rows, 0, start)
                    start, rows = start + rows, 0
        if rows:
            yield Piece(rows, begun) if seekable else Piece(rows, 0, start)

    def read(self, path: str, piece: Piece, schema: pa.Schema) -> pa.Table:
        lines: list[bytes] = []
        with _open(path) as file:
            if piece.at:
                file.seek(piece.at)
            filled = (line for line in file if line.strip())
            for _ in range(piece.skip):
                next(filled, None)
            lines.extend(line for line, _ in zip(filled, range(piece.rows), strict=False))
        try:
            table = _parse(lines, schema)
        except pa.ArrowException as error:
            raise Damaged(f"the lines can't be parsed: {error}") from error
        if table.num_rows != piece.rows:
            raise Damaged(f"{table.num_rows} rows where there were {piece.rows}")
        return table


def _compressed(path: str) -> bool:
    return not path.endswith((".jsonl", ".json", ".ndjson"))


def _open(path: str) -> IO[bytes]:
    source = pa.input_stream(path, compression="detect", buffer_size=2**20)
    return cast(IO[bytes], io.BufferedReader(source) if _compressed(path) else open(path, "rb"))


def _blocks(path: str) -> Iterator[list[bytes]]:
    """The file's lines in blocks of about `_BLOCK_BYTES`, blank ones included."""
    try:
        with _open(path) as file:
            while lines := file.readlines(_BLOCK_BYTES):
                yield lines
    except OSError as error:
        raise DataError(
            f"{path} can't be decompressed ({error}). It may be cut off: copy it again."
        ) from error


def _parse(lines: list[bytes], schema: pa.Schema | None = None) -> pa.Table:
    content = b"".join(line if line.endswith(b"\n") else line + b"\n" for line in lines)
    return pj.read_json(
        io.BytesIO(content),
        pj.ReadOptions(use_threads=False, block_size=max(len(content) + 1, 2**16)),
        pj.ParseOptions(
            explicit_schema=schema,
            unexpected_field_behavior="infer" if schema is None else "error",
        ),
    )


def _parse_or_locate(path: str, lines: list[bytes], first_line: int) -> pa.Table:
    """Parses a block; on failure finds the line at fault."""
    _check_utf8(path, lines, first_line)
    if not any(line.strip() for line in lines):
        return pa.table({})
    try:
        return _parse(lines)
    except pa.ArrowException as error:
        for number, line in enumerate(lines, first_line):
            try:
                if line.strip():
                    _parse([line])
            except pa.ArrowException as culprit:
                raise DataError(
                    f"{path}, line {number} is not a JSON object ({culprit}). RayReward reads "
                    "JSON Lines: one object a line. Repair or remove the line."
                ) from culprit
        raise DataError(
            f"{path}: lines {first_line} to {first_line + len(lines) - 1} don't fit together "
            f"({error}). Give each column one type."
        ) from error


def _check_utf8(path: str, lines: list[bytes], first_line: int) -> None:
    for number, line in enumerate(lines, first_line):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}, line {number} is not valid UTF-8 ({error.reason} at byte {error.start} "
                "of the line). Convert the file to UTF-8."
            ) from error


def _as_text(schema: pa.Schema) -> pa.Schema:
    """JSON has no dates: what merely looks like one is read as text."""
    return pa.schema([field.with_type(_text_type(field.type)) for field in schema])


def _text_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_temporal(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_text_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_text_type(field.type)) for field in kind])
    return kind
