"""The columns of a dataset: what its files have in common, and what the output can hold.

A column comes out with the type that it went in with, but for these:

- views of text and bytes become `large_string` and `large_binary`, since Parquet's writer can't
  slice them;
- where files differ in how wide their text, bytes and lists are (`string`, `large_string`,
  dictionaries of text; `binary`, `large_binary`; `list`, `large_list`), all have the large type;
- Parquet keeps seconds as milliseconds, days in 64 bits as days in 32, and dictionaries of anything
  but text as plain values. Types that it can't hold are refused.

Knows Arrow; does not know files.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayreward.errors import DataError
from rayreward.preferences import is_string

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
    """The columns as the plan has them.

    Without what a single file says of them: its metadata, and that it has no nulls. What makes a
    column one of an extension type that is not registered here stays.

    Raises:
        DataError: A column is of a type that the output can't hold.
    """
    return pa.schema(
        [
            pa.field(field.name, _without_views(field), metadata=_extension(field))
            for field in schema
        ]
    )


def _extension(field: pa.Field) -> dict[bytes, bytes] | None:
    given = field.metadata or {}
    return {key: text for key, text in given.items() if key.startswith(_EXTENSION)} or None


def _without_views(field: pa.Field) -> pa.DataType:
    kind = _map_within(field.type, _without_view)
    if kind == field.type:
        return kind
    try:
        pa.nulls(1, field.type).cast(kind)
    except pa.ArrowNotImplementedError as error:
        raise _not_storable(field, error) from error
    return kind


def _without_view(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_string_view(kind):
        return pa.large_string()
    return pa.large_binary() if pa.types.is_binary_view(kind) else kind


def unite(ours: pa.Schema, theirs: pa.Schema) -> tuple[pa.Schema, list[str]]:
    """Unites the columns of two files.

    Returns:
        The columns in the order of the first, and the names of those that can't be united, sorted.
    """
    given, found = ({field.name: field.type for field in columns} for columns in (ours, theirs))
    united = {name: _widest_of(kind, found.get(name)) for name, kind in given.items()}
    apart = found.keys() - given.keys() | {name for name, kind in united.items() if kind is None}
    if apart:
        return ours, sorted(apart)
    return pa.schema([field.with_type(united[field.name]) for field in ours]), []


def _widest_of(one: pa.DataType, other: pa.DataType | None) -> pa.DataType | None:
    """A type that holds both, or null if they differ in more than width."""
    if other is None or one == other:
        return other
    wide = _map_within(one, _widest)
    return wide if wide == _map_within(other, _widest) else None


def _widest(kind: pa.DataType) -> pa.DataType:
    if is_string(kind):
        return pa.large_string()
    if pa.types.is_binary(kind):
        return pa.large_binary()
    return pa.large_list(kind.value_type) if pa.types.is_list(kind) else kind


_LISTS: tuple[tuple[Callable[[Any], bool], Callable[[Any], Any]], ...] = (
    (pa.types.is_list, lambda kind: pa.list_(kind)),
    (pa.types.is_large_list, pa.large_list),
    (pa.types.is_list_view, pa.list_view),
    (pa.types.is_large_list_view, pa.large_list_view),
)


def _map_within(kind: pa.DataType, change: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """Changes a type and all types within it, from the inside."""
    if pa.types.is_struct(kind):
        fields = [field.with_type(_map_within(field.type, change)) for field in kind]
        return change(pa.struct(fields))
    if pa.types.is_map(kind):
        inner = [_map_within(of, change) for of in (kind.key_type, kind.item_type)]
        return change(pa.map_(*inner))
    if pa.types.is_fixed_size_list(kind):
        return change(pa.list_(_map_within(kind.value_type, change), kind.list_size))
    for is_kind, make in _LISTS:
        if is_kind(kind):
            return change(make(_map_within(kind.value_type, change)))
    return change(kind)


def check_storable(schema: pa.Schema) -> None:
    """Refuses columns that could be read but not be passed on to the output.

    Raises:
        DataError: Parquet has no way to hold one.
    """
    for field in schema:
        try:
            pq.write_table(null_rows(pa.schema([field]), 1), io.BytesIO())
        except pa.ArrowNotImplementedError as error:
            raise _not_storable(field, error) from error


def _not_storable(field: pa.Field, error: Exception) -> DataError:
    return DataError(
        f"Column {field.name!r} is of type {field.type}, which Parquet can't hold and the output "
        f"is Parquet ({error}). Convert or drop it first."
    )


def null_rows(schema: pa.Schema, rows: int) -> pa.Table:
    """Rows that are null in every column."""
    return pa.table([pa.nulls(rows, field.type) for field in schema], schema=schema)
