"""What callers hand over in memory: items to score one by one, and tables.

Knows Python values and Arrow; how a record becomes a sample is told by `rayreward.preferences`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rayreward.errors import DataError
from rayreward.preferences import RowFormat, RowKind, find_format
from rayreward.types import Failure, Sample

if TYPE_CHECKING:
    import pyarrow as pa

_TEXT = RowFormat(RowKind.SINGLE, ("text",))
_MESSAGES = RowFormat(RowKind.SINGLE, ("messages",))


def to_samples(batch: Iterable[Any]) -> list[Sample]:
    """Reads a batch, item by item.

    Raises:
        DataError: It is one item and no batch, or an item is none that `to_sample` takes.
    """
    return [to_sample(item) for item in as_batch(batch)]


def to_sample(item: Any) -> Sample:
    """Reads one item of a batch.

    Args:
        item: A text, a conversation (a list of messages), a record with the columns of a format
            that has one reward a row, or a sample.

    Raises:
        DataError: It is none of these.
    """
    if isinstance(item, str):
        return _only(_TEXT, {"text": item})
    if isinstance(item, Sample):
        return item
    if isinstance(item, Mapping):
        if "role" in item:
            raise DataError(
                "A message is no conversation. Pass a list of conversations, each of which is a "
                "list of messages."
            )
        found = find_format(map(str, item))
        if found.kind is RowKind.SINGLE:
            return _only(found, item)
        raise DataError(
            f"A record with {' and '.join(found.columns)} has more than one reward. Use "
            "score_table for pairs and score_completions for lists of completions."
        )
    if isinstance(item, Sequence) and not isinstance(item, bytes):
        return _only(_MESSAGES, {"messages": item})
    raise DataError(
        f"Can't score a value of type {type(item).__name__}. Pass texts, records such as "
        '{"prompt": …, "completion": …}, or conversations (lists of messages).'
    )


def _only(row_format: RowFormat, row: Mapping[str, Any]) -> Sample:
    samples = row_format.samples(row)
    return samples if isinstance(samples, Failure) else samples[0]


def as_batch(batch: Iterable[Any]) -> Iterable[Any]:
    """A batch as it is, if it is one; of an array of Arrow what its scalars hold.

    Raises:
        DataError: It is one item, or a data frame, which would fall apart into characters or names.
    """
    if isinstance(batch, str | bytes | Mapping):
        raise DataError(
            f"Expected a list of what to score, and got one {type(batch).__name__}. Put it into a "
            "list, and look for the reward at [0]."
        )
    if hasattr(batch, "columns"):  # as tables of pandas, polars and Arrow have
        raise DataError(
            f"Expected a list of what to score, and got a {type(batch).__name__}. Pass it to "
            "score_table, or one of its columns as a list."
        )
    return batch.to_pylist() if hasattr(batch, "to_pylist") else batch


def to_table(rows: Any) -> pa.Table:
    """Rows as an Arrow table: one, a record batch, a `datasets.Dataset`, or what exports one.

    Source: the Arrow PyCapsule interface, `__arrow_c_stream__`, of pandas, polars and others.

    Raises:
        DataError: It is nothing of the kind, or has a column that Arrow has no type for.
    """
    import pyarrow as pa

    if isinstance(rows, pa.Table):
        return rows
    if isinstance(rows, pa.RecordBatch):
        return pa.Table.from_batches([rows])
    datasets = sys.modules.get("datasets")  # who has one has imported it
    if datasets is not None and isinstance(rows, datasets.Dataset):
        rows = rows.with_format("arrow")[:]
    if hasattr(rows, "__arrow_c_stream__"):
        try:
            return pa.table(rows)
        except pa.ArrowException as error:  # a column that holds text and numbers, say
            raise DataError(f"The {type(rows).__name__} is no Arrow table: {error}") from error
    raise DataError(
        f"Expected a table, and got a {type(rows).__name__}. Pass an Arrow table, a data frame of "
        "pandas or polars, or a datasets.Dataset."
    )
