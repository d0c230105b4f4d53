"""JSON Lines, plain or compressed: one object a line, blank lines passed over.

The schema is found by parsing the whole file once, block by block, so that a column means the
same in every shard. Dates stay the text that they are.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Callable, Iterator
from itertools import accumulate, islice
from typing import IO, cast

import pyarrow as pa
import pyarrow.json as pj

from rayreward import storage
from rayreward.errors import DataError
from rayreward.formats.base import Piece, Scan, decoding

_BLOCK_BYTES = 2**20
"""Parsed at once when a file is looked through, and the most that is passed over to find a row."""

_PARSE_BYTES = 2**30
"""The most that pyarrow is given at once; it counts bytes in 32 bits."""

_CODECS = {".gz": "gzip", ".zst": "zstd"}

_MAX_DEPTH = 100
"""Brackets within brackets in a line. pyarrow goes down them by recursion and some 50,000 crash
the process."""

_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"')
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")


class JsonLines:
    """JSON Lines, decompressed by file extension."""

    name = "json"
    title = "JSON Lines"

    def scan(self, path: str) -> Scan:
        schema, pieces, first_line, offset = pa.schema([]), [], 1, 0
        for lines in _blocks(path):
            if any(map(_filled, lines)):
                found = _parse_or_locate(path, lines, first_line)
                schema = _widen(path, schema, found.type, first_line)
                pieces.append(Piece(len(found), offset))
            first_line += len(lines)
            offset += sum(map(len, lines))
        scan = Scan(schema, tuple(pieces))
        if _codec(path) is None:
            return scan
        return Scan(schema, (Piece(scan.rows, 0),))  # there is no way in but from the start

    def read(self, path: str, piece: Piece, schema: pa.Schema) -> pa.Table:
        with decoding("the lines"), _open(path) as file:
            if piece.at:
                file.seek(piece.at)
            lines = islice(filter(_filled, file), piece.skip, piece.skip + piece.rows)
            return pa.Table.from_struct_array(_parse(list(lines), schema))


def settle(schema: pa.Schema) -> pa.Schema:
    """The schema to read with, once all files have been looked at.

    What was null everywhere becomes text: pyarrow loses the first item of a list of nulls.
    """
    return _map_types(schema, lambda kind: pa.string() if pa.types.is_null(kind) else kind)


def _filled(line: bytes) -> bool:
    return bool(line.strip())


def _codec(path: str) -> str | None:
    return next((codec for end, codec in _CODECS.items() if path.lower().endswith(end)), None)


def _open(path: str) -> IO[bytes]:
    codec = _codec(path)
    if codec is None:
        return storage.storage_of(path).open(path)
    packed = storage.storage_of(path).open(path) if storage.is_url(path) else path
    return cast(IO[bytes], io.BufferedReader(pa.input_stream(packed, compression=codec), 2**20))


def _blocks(path: str) -> Iterator[list[bytes]]:
    """The file's lines in blocks of about `_BLOCK_BYTES`, blank ones included."""
    with decoding("the file"), _open(path) as file:
        while lines := file.readlines(_BLOCK_BYTES):
            yield lines


def _parse(lines: list[bytes], schema: pa.Schema | None = None) -> pa.ChunkedArray:
    """Parses lines into structs, one a line.

    Each line is wrapped into an object of its own: pyarrow crashes on a line that is `null`, and
    takes two objects on a line for two rows.

    Raises:
        pyarrow.ArrowException: They are not objects, or don't fit together.
    """
    if any(_depth(line) > _MAX_DEPTH for line in lines):
        raise pa.ArrowInvalid(f"nested more than {_MAX_DEPTH} levels deep")
    bare = (line.strip().removeprefix(codecs.BOM_UTF8) for line in lines)
    content = b"".join(b'{"row":%b}\n' % line for line in bare)
    rows = pj.read_json(
        pa.BufferReader(content),
        pj.ReadOptions(use_threads=False, block_size=min(len(content) + 1, _PARSE_BYTES)),
        pj.ParseOptions(
            explicit_schema=schema and pa.schema([("row", pa.struct(schema))]),
            unexpected_field_behavior="infer" if schema is None else "error",
        ),
    )["row"]
    if not pa.types.is_struct(rows.type) or rows.null_count or len(rows) != len(lines):
        raise pa.ArrowInvalid("not one object a line")
    return rows


def _depth(line: bytes) -> int:
    """How deep the brackets of a line go, or their number where that is few."""
    opening = line.count(b"[") + line.count(b"{")
    if opening <= _MAX_DEPTH:
        return opening
    brackets = _STRING.sub(b"", line).translate(None, _NO_BRACKETS)
    return max(accumulate(1 if bracket in b"[{" else -1 for bracket in brackets), default=0)


def _parse_or_locate(path: str, lines: list[bytes], first_line: int) -> pa.ChunkedArray:
    """Parses a block; on failure finds the line at fault."""
    _check_utf8(path, lines, first_line)
    try:
        return _parse(list(filter(_filled, lines)))
    except pa.ArrowException as error:
        for number, line in enumerate(lines, first_line):
            try:
                if _filled(line):
                    _parse([line])
            except pa.ArrowException as culprit:
                raise DataError(
                    f"{path}, line {number} can't be read as a JSON object ({culprit}). RayReward "
                    f"reads JSON Lines: one object a line. {_remedy(line)}"
                ) from culprit
        raise DataError(
            f"{path}: lines {first_line} to {first_line + len(lines) - 1} don't fit together "
            f"({error}). Give each column one type."
        ) from error


def _remedy(line: bytes) -> str:
    if line.lstrip().removeprefix(codecs.BOM_UTF8).startswith(b"["):
        return "If the file is one array, `jq -c '.[]'` makes JSON Lines of it."
    return "Repair or remove the line."


def _check_utf8(path: str, lines: list[bytes], first_line: int) -> None:
    for number, line in enumerate(lines, first_line):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}, line {number} is not valid UTF-8 ({error.reason} at byte {error.start} "
                "of the line). Convert the file to UTF-8."
            ) from error


def _widen(path: str, schema: pa.Schema, found: pa.StructType, first_line: int) -> pa.Schema:
    """The schema of the blocks so far and one more, in which dates are text."""
    new = _map_types(
        pa.schema(list(found)), lambda kind: pa.string() if pa.types.is_temporal(kind) else kind
    )
    try:
        return pa.unify_schemas([schema, new], promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(
            f"{path}: a column changes its type between lines before and after line "
            f"{first_line} ({error}). Give each column one type."
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
