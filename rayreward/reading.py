"""A shard's rows, read on the machine that scores them.

Does not know torch or Ray.
"""

from __future__ import annotations

import os

import pyarrow as pa

from rayreward.errors import DataError
from rayreward.formats import Damaged, format_named
from rayreward.shards import Shard


def read_shard(shard: Shard, schema: pa.Schema) -> pa.Table:
    """Reads a shard's rows.

    Args:
        shard: What to read.
        schema: The plan's schema; the columns come in its order.

    Raises:
        Damaged: The rows can't be decoded.
        DataError: The file is gone, or is not the one that was planned.
    """
    _check_unchanged(shard)
    table = format_named(shard.file.format).read(shard.file.path, shard.piece, schema)
    try:
        table = table.select(schema.names).cast(schema)
        table.validate(full=True)
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error):  # text that is not UTF-8 is told row by row
            raise Damaged(f"the rows don't hold together: {error}") from error
    return table


def _check_unchanged(shard: Shard) -> None:
    file = shard.file
    try:
        stat = os.stat(file.path)
    except OSError as error:
        raise DataError(
            f"{file.path} can't be read on this machine ({error.strerror}). Every machine of the "
            "cluster has to see the dataset under the same path."
        ) from error
    if (stat.st_size, stat.st_mtime_ns) != (file.size_bytes, file.mtime_ns):
        raise DataError(
            f"{file.path} has changed since the job was planned. Start over with restart=True "
            "(--restart), or restore the file."
        )
