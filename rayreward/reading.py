"""A shard's rows, read on the machine that scores them.

Does not know torch or Ray.
"""

from __future__ import annotations

import pyarrow as pa

from rayreward import storage
from rayreward.errors import DataError
from rayreward.formats import Damaged, format_named
from rayreward.preferences import is_string
from rayreward.schemas import null_rows
from rayreward.shards import Extent, Shard, SourceFile
from rayreward.types import Failure, Status


def read_shard(shard: Shard, schema: pa.Schema) -> tuple[pa.Table, dict[int, Failure]]:
    """Reads a shard's rows.

    Args:
        shard: What to read.
        schema: The plan's schema; the columns come in its order.

    Returns:
        All of its rows, and the numbers of those that can't be decoded, with the reason: they are
        null. What is damaged in one file or row group spares the rows from the others.

    Raises:
        DataError: A file is gone, or is not the one that was planned.
    """
    for file in dict.fromkeys(extent.file for extent in shard.extents):
        _check_unchanged(file)
    tables: list[pa.Table] = []
    lost: dict[int, Failure] = {}
    start = 0
    for extent in shard.extents:
        try:
            tables.append(_read_extent(extent, schema))
        except Damaged as error:
            tables.append(null_rows(schema, extent.rows))
            failure = Failure(Status.UNREADABLE, str(error))
            lost.update(dict.fromkeys(range(start, start + extent.rows), failure))
        start += extent.rows
    return pa.concat_tables(tables).combine_chunks(), lost


def _read_extent(extent: Extent, schema: pa.Schema) -> pa.Table:
    path, piece = extent.file.path, extent.piece
    try:
        table = format_named(extent.file.format).read(path, piece, schema)
        if table.num_rows != piece.rows:
            raise Damaged(f"{table.num_rows} rows where there were {piece.rows}")
        for column in table.columns:
            for chunk in column.chunks:
                _check_sound(chunk)
        return table.select(schema.names).cast(schema)
    except (pa.ArrowException, LookupError, UnicodeDecodeError) as error:
        raise Damaged(f"the rows don't hold together: {error}") from error
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}.") from error


def _check_sound(array: pa.Array) -> None:
    """Checks that offsets and indices lead nowhere outside, before anything follows them.

    Text may be invalid: it is told row by row. But pyarrow's check ends there and may not have
    come to the rest, which is then checked part by part.

    Raises:
        pyarrow.ArrowInvalid: They do.
    """
    try:
        array.validate(full=True)
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error):
            raise
        for part in _parts(array):
            _check_sound(part)


def _parts(array: pa.Array) -> list[pa.Array]:
    """What lies in an array, and its own offsets or indices around nulls in place of that."""
    kind = array.type
    if is_string(kind) and not pa.types.is_dictionary(kind):
        return []
    if pa.types.is_struct(kind):
        return [array.field(index) for index in range(kind.num_fields)]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        hull = type(array).from_arrays(array.offsets, pa.nulls(len(array.values)))
        return [array.values, hull]
    if pa.types.is_dictionary(kind):
        blank = pa.nulls(len(array.dictionary))
        return [array.dictionary, type(array).from_arrays(array.indices, blank, safe=False)]
    raise pa.ArrowInvalid(f"text in a column of type {kind} is not valid UTF-8")


def _check_unchanged(file: SourceFile) -> None:
    try:
        stat = storage.storage_of(file.path).stat(file.path)
    except OSError as error:
        raise DataError(
            f"{file.path} can't be read on this machine ({error.strerror}). Every machine of the "
            "cluster has to see the dataset under the same path."
        ) from error
    if stat != storage.Stat(file.size_bytes, file.mtime_ns, file.etag):
        raise DataError(
            f"{file.path} has changed since the job was planned. Start over with restart=True "
            "(--restart), or restore the file."
        )
