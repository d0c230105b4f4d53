"""The columns of a dataset: what its files have in common, and what the output can hold.

A column comes out with the type that it went in with. Files may differ in how wide their text,
bytes and lists are (`string`, `large_string`, `string_view`, dictionaries of text; `list`,
`large_list`, …): the dataset's column then is of the widest, which holds them all. Parquet keeps
seconds as milliseconds, days in 64 bits as days in 32, and dictionaries of anything but text as
plain values; types that it can't hold are refused. Knows Arrow; does not know files.
"""

from __future__ import annotations

import io
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq

from rayreward.errors import DataError
from rayreward.preferences import is_list_of, is_string

_EXTENSION = b"ARROW:extension:"
"""Begins the metadata of a field whose type is an extension that is not registered here."""


def check_names(path: str, fields: list[pa.Field]) -> None:
    """Refuses columns, and fields within them, that can't be told apart by name.

    Raises:
        DataError: Several of them have one name.
    """
    repeated = [name for name, n in Counter(field.name for field in fields).items() if n > 1]
    if repeated:
        raise DataError(
            f"{path} has several columns or fields named {', '.join(map(repr, repeated))}. Rename "
            "or drop them first."
        )
    for kind in (field.type for field in fields):
        check_names(path, [kind.field(index) for index in range(kind.num_fields)])


def bare(schema: pa.Schema) -> pa.Schema:
    """The columns less what a single file says of them: its metadata, and that it has no nulls.

    What makes a column one of an extension type stays.
    """
    return pa.schema(
        [pa.field(field.name, field.type, metadata=_extension(field)) for field in schema]
    )


def _extension(field: pa.Field) -> dict[bytes, bytes] | None:
    given = field.metadata or {}
    return {key: text for key, text in given.items() if key.startswith(_EXTENSION)} or None


def unite(ours: pa.Schema, theirs: pa.Schema) -> tuple[pa.Schema, list[str]]:
    """Unites the columns of two files.

    Returns:
        The columns in the order of the first, and the names of those that can't be united, sorted.
    """
    if ours == theirs:
        return ours, []
    differing = set(ours.names) ^ set(theirs.names)
    united = []
    for field in ours:
        kind = (
            _widest_of(field.type, theirs.field(field.name).type)
            if field.name in theirs.names
            else None
        )
        if kind is None:
            differing.add(field.name)
        else:
            united.append(field.with_type(kind))
    return (ours if differing else pa.schema(united)), sorted(differing)


def _widest_of(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """A type that holds both, or null if they differ in more than width."""
    if one == other:
        return one
    wide = _widest(one)
    return wide if wide == _widest(other) else None


def _widest(kind: pa.DataType) -> pa.DataType:
    if is_string(kind):
        return pa.large_string()
    if any(is_kind(kind) for is_kind in (pa.types.is_binary, pa.types.is_binary_view)):
        return pa.large_binary()
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, _widest(field.type)) for field in kind])
    if is_list_of(kind, lambda _: True) and not pa.types.is_fixed_size_list(kind):
        return pa.large_list(_widest(kind.value_type))
    return kind


def check_storable(schema: pa.Schema) -> None:
    """Refuses columns that could be read but not be passed on to the output.

    Raises:
        DataError: Parquet has no way to hold one.
    """
    for field in schema:
        try:
            pq.write_table(null_rows(pa.schema([field]), 1), io.BytesIO())
        except pa.ArrowNotImplementedError as error:
            raise DataError(
                f"Column {field.name!r} is of type {field.type}, which Parquet can't hold and the "
                f"output is Parquet ({error}). Convert or drop it first."
            ) from error


def null_rows(schema: pa.Schema, rows: int) -> pa.Table:
    """Rows that are null in every column."""
    return pa.table([pa.nulls(rows, field.type) for field in schema], schema=schema)
