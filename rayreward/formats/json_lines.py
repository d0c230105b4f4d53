"""JSON, plain or compressed: one object a line, or one array of objects (`json_array`).

Blank lines are passed over. The schema is found by parsing the whole file once, block by block, so
that a column means the same in every shard. Dates stay the text that they are.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Literal

import pyarrow as pa
import pyarrow.json as pj

from rayreward import storage
from rayreward.errors import DataError
from rayreward.formats.base import Piece, Scan, decoding
from rayreward.formats.json_array import begins_array, items

_BLOCK_BYTES = 2**20
"""Parsed at once when a file is looked through, and the most that is passed over to find a row."""

_PARSE_BYTES = 2**30
"""The most that pyarrow is given at once; it counts bytes in 32 bits."""

_CODECS = {".gz": "gzip", ".zst": "zstd"}

_MAX_DEPTH = 100
"""Brackets within brackets in a row. pyarrow goes down them by recursion and some 50,000 crash
the process."""

_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"')
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")


class Json:
    """JSON Lines or a JSON array, decompressed by file extension."""

    name = "json"
    title = "JSON"

    def scan(self, path: str) -> Scan:
        schema, pieces = pa.schema([]), []
        for block in _blocks(path):
            if any(map(_filled, block.rows)):
                found = _parse_or_locate(path, block)
                schema = _widen(path, schema, found.type, block)
                pieces.append(Piece(len(found), block.at))
        scan = Scan(schema, tuple(pieces))
        if _codec(path) is None:
            return scan
        return Scan(schema, (Piece(scan.rows, 0),))  # there is no way in but from the start

    def read(self, path: str, piece: Piece, schema: pa.Schema) -> pa.Table:
        with decoding("the rows"), _open(path) as file:
            filled = (row for _, row in _rows(file, piece.at) if _filled(row))
            rows = islice(filled, piece.skip, piece.skip + piece.rows)
            return pa.Table.from_struct_array(_parse(list(rows), schema))


def settle(schema: pa.Schema) -> pa.Schema:
    """The schema to read with, once all files have been looked at.

    What was null everywhere becomes text: pyarrow loses the first item of a list of nulls.
    """
    return _map_types(schema, lambda kind: pa.string() if pa.types.is_null(kind) else kind)


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows that are looked at together, blank lines included.

    Attributes:
        rows: Their bytes.
        at: Where the first one begins.
        kind: What people call a row of this file.
        first: The number of the first one, from 1.
    """

    rows: list[bytes]
    at: int
    kind: Literal["line", "item"]
    first: int


def _filled(row: bytes) -> bool:
    return bool(row.strip())


def _codec(path: str) -> str | None:
    return next((codec for end, codec in _CODECS.items() if path.lower().endswith(end)), None)


def _open(path: str) -> io.BufferedReader:
    codec = _codec(path)
    if codec is None:
        return storage.storage_of(path).open(path)
    packed = storage.storage_of(path).open(path) if storage.is_url(path) else path
    return io.BufferedReader(pa.input_stream(packed, compression=codec), 2**20)


def _rows(file: io.BufferedReader, at: int = 0) -> Iterator[tuple[int, bytes]]:
    """Lines or items, from byte `at` on: where to begin with each, and its bytes."""
    if at:
        file.seek(at)
    if begins_array(file, at):
        yield from items(file, at)
    else:
        for line in file:
            yield at, line
            at += len(line)


def _blocks(path: str) -> Iterator[_Block]:
    """The file in blocks of about `_BLOCK_BYTES`."""
    with decoding("the file"), _open(path) as file:
        kind: Literal["line", "item"] = "item" if begins_array(file) else "line"
        block, size = _Block([], 0, kind, 1), 0
        for at, row in _rows(file):
            if size > _BLOCK_BYTES:
                yield block
                block, size = _Block([], at, kind, block.first + len(block.rows)), 0
            block.rows.append(row)
            size += len(row)
        yield block


def _parse(rows: list[bytes], schema: pa.Schema | None = None) -> pa.ChunkedArray:
    """Parses lines or items into structs.

    Each is wrapped into an object of its own: pyarrow crashes on a line that is `null`, and takes
    two objects on a line for two rows.

    Raises:
        pyarrow.ArrowException: They are not objects, or don't fit together.
    """
    if any(_depth(row) > _MAX_DEPTH for row in rows):
        raise pa.ArrowInvalid(f"nested more than {_MAX_DEPTH} levels deep")
    bare = (row.strip().removeprefix(codecs.BOM_UTF8) for row in rows)
    content = b"".join(b'{"row":%b}\n' % row for row in bare)
    found = pj.read_json(
        pa.BufferReader(content),
        pj.ReadOptions(use_threads=False, block_size=min(len(content) + 1, _PARSE_BYTES)),
        pj.ParseOptions(
            explicit_schema=schema and pa.schema([("row", pa.struct(schema))]),
            unexpected_field_behavior="infer" if schema is None else "error",
        ),
    )["row"]
    if not pa.types.is_struct(found.type) or found.null_count or len(found) != len(rows):
        raise pa.ArrowInvalid("not one object")
    return found


def _depth(row: bytes) -> int:
    """How deep the brackets of a row go, or their number where that is few."""
    opening = row.count(b"[") + row.count(b"{")
    if opening <= _MAX_DEPTH:
        return opening
    brackets = _STRING.sub(b"", row).translate(None, _NO_BRACKETS)
    return max(accumulate(1 if bracket in b"[{" else -1 for bracket in brackets), default=0)


def _parse_or_locate(path: str, block: _Block) -> pa.ChunkedArray:
    """Parses a block; on failure finds the row at fault."""
    kind = block.kind
    _check_utf8(path, block)
    try:
        return _parse(list(filter(_filled, block.rows)))
    except pa.ArrowException as error:
        for number, row in enumerate(block.rows, block.first):
            try:
                if _filled(row):
                    _parse([row])
            except pa.ArrowException as culprit:
                raise DataError(
                    f"{path}, {kind} {number} can't be read as a JSON object ({culprit}). JSON is "
                    f"read as one object a line, or as one array of objects. Repair or remove the "
                    f"{kind}."
                ) from culprit
        raise DataError(
            f"{path}: {kind}s {block.first} to {block.first + len(block.rows) - 1} don't fit "
            f"together ({error}). Give each column one type."
        ) from error


def _check_utf8(path: str, block: _Block) -> None:
    kind = block.kind
    for number, row in enumerate(block.rows, block.first):
        try:
            row.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}, {kind} {number} is not valid UTF-8 ({error.reason} at byte {error.start} "
                f"of the {kind}). Convert the file to UTF-8."
            ) from error


def _widen(path: str, schema: pa.Schema, found: pa.StructType, block: _Block) -> pa.Schema:
    """The schema of the blocks so far and one more, in which dates are text."""
    new = _map_types(
        pa.schema(list(found)), lambda kind: pa.string() if pa.types.is_temporal(kind) else kind
    )
    try:
        return pa.unify_schemas([schema, new], promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(
            f"{path}: a column changes its type between {block.kind}s before and after "
            f"{block.kind} {block.first} ({error}). Give each column one type."
        ) from error


def _map_types(schema: pa.Schema, change: Callable[[pa.DataType], pa.DataType]) -> pa.Schema:
    """Changes the types of all columns and of all that is within them."""

    def changed(kind: pa.DataType) -> pa.DataType:
        if pa.types.is_list(kind):
            return pa.list_(changed(kind.value_type))
        if pa.types.is_struct(kind):
            return pa.struct([field.with_type(changed(field.type)) for field in kind])
        return change(kind)

    return pa.schema([field.with_type(changed(field.type)) for field in schema])
