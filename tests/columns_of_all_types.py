"""Columns of every type that Parquet holds, for tests: four rows each, one of them null."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

TEXTS = ["a", "a longer text, beyond twelve bytes", None, "é"]
TEXT_TYPES = (
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.dictionary(pa.int8(), pa.string()),
    pa.dictionary(pa.int32(), pa.string()),
)
_BYTES = [b"", b"\xff\xfe", None, b"bytes that are more than twelve"]
_LISTS = [[1, 2], [], None, [None]]
_UUIDS = [b"0123456789abcdef", b"\xff" * 16, None, bytes(16)]
_TURN = {"role": "user", "content": "hello", "seen": {"by": ["x", None]}}


def _in_struct(kind: pa.DataType) -> pa.DataType:
    return pa.struct([("x", kind)])


def _extension(kind: Any, values: list[Any]) -> pa.Array:
    return pa.ExtensionArray.from_storage(kind, pa.array(values, kind.storage_type))


UNCHANGED: dict[str, pa.Array] = {
    **{
        f"text as {kind}": pa.array(TEXTS).cast(kind)
        for kind in TEXT_TYPES
        if kind != pa.string_view()
    },
    **{f"bytes as {kind}": pa.array(_BYTES, kind) for kind in (pa.binary(), pa.large_binary())},
    **{
        f"lists as {kind}": pa.array(_LISTS, kind)
        for kind in (
            pa.list_(pa.int8()),
            pa.large_list(pa.int8()),
            pa.list_view(pa.int8()),
            pa.large_list_view(pa.int8()),
        )
    },
    "nested": pa.array([[_TURN, None], [], None, [{"role": None, "content": "x", "seen": None}]]),
    "dictionaries within": pa.array(
        [[text] for text in TEXTS], pa.list_(pa.dictionary(pa.int32(), pa.string()))
    ),
    "fixed lists": pa.array([[1, 2], [3, None], None, [4, 5]], pa.list_(pa.int8(), 2)),
    "map": pa.array([[("a", 1)], [], None, [("b", None)]], pa.map_(pa.string(), pa.int32())),
    "fixed bytes": pa.array([b"aa", b"\xff\0", None, b"bb"], pa.binary(2)),
    "float16": pa.array([1, -0.0, None, float("inf")], pa.float16()),
    "uint64": pa.array([2**64 - 1, 0, None, 1], pa.uint64()),
    "decimal": pa.array([1, -2, None, 3], pa.decimal128(38, 2)),
    "decimal256": pa.array([1, -2, None, 3], pa.decimal256(70, 2)),
    "duration": pa.array([1, -2, None, 3], pa.duration("ns")),
    "timestamp": pa.array([1, -2, None, 3], pa.timestamp("ns", "Europe/Berlin")),
    "null": pa.nulls(4),
    "json": _extension(pa.json_(pa.string()), ['{"a": 1}', "[]", None, "1"]),
    "uuid": _extension(pa.uuid(), _UUIDS),
    "bool8": _extension(pa.bool8(), [1, 0, None, 1]),
    "tensor": _extension(pa.fixed_shape_tensor(pa.int8(), [2]), [[1, 2], [3, 4], None, [5, 6]]),
    "uuids within": pa.ListArray.from_arrays([0, 1, 2, 3, 4], _extension(pa.uuid(), _UUIDS)),
}
"""These come out as they went in."""

CONVERTED: dict[str, tuple[pa.Array, pa.DataType]] = {
    "text views": (pa.array(TEXTS, pa.string_view()), pa.large_string()),
    "bytes views": (pa.array(_BYTES, pa.binary_view()), pa.large_binary()),
    "views within": (
        pa.array([[{"x": text}, None] for text in TEXTS], pa.list_(_in_struct(pa.string_view()))),
        pa.list_(_in_struct(pa.large_string())),
    ),
    "views in a map": (
        pa.array([[("a", b"x")], [], None, []], pa.map_(pa.string_view(), pa.binary_view())),
        pa.map_(pa.large_string(), pa.large_binary()),
    ),
    "seconds": (pa.array([1, -2, None, 3], pa.timestamp("s")), pa.timestamp("ms")),
    "clock": (pa.array([1, 2, None, 3], pa.time32("s")), pa.time32("ms")),
    "days": (pa.array([86_400_000, 0, None, 0], pa.date64()), pa.date32()),
    "dictionary of numbers": (pa.array([7, 7, None, 8]).dictionary_encode(), pa.int64()),
    "dictionary of wide text": (
        pa.array(TEXTS, pa.large_string()).dictionary_encode(),
        pa.dictionary(pa.int32(), pa.string()),
    ),
}
"""These come out with the same values, in the type that is given."""

REFUSED: dict[str, pa.Array] = {
    "views in a view": pa.array([["a"], [], None, []], pa.list_view(pa.string_view())),
    "runs": pa.RunEndEncodedArray.from_arrays(pa.array([2, 4], pa.int32()), pa.array(["a", "b"])),
    "interval": pa.array([(1, 2, 3)] * 4, pa.month_day_nano_interval()),
    "union": pa.UnionArray.from_sparse(
        pa.array([0, 1, 0, 1], pa.int8()), [pa.array([1, 2, 3, 4]), pa.array(list("abcd"))]
    ),
}
"""Parquet holds none of these, or pyarrow can't convert them to what it holds."""
