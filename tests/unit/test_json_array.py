"""json_array: the items of an array come out as they went in, from any one on."""

from __future__ import annotations

import io
import json
from typing import Any, cast

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayreward.formats import json_array
from rayreward.formats.json_array import begins_array, items

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def _opened(data: bytes) -> io.BufferedReader:
    return io.BufferedReader(cast(Any, io.BytesIO(data)))


def _items(data: bytes, at: int = 0) -> list[tuple[int, bytes]]:
    file = _opened(data)
    file.seek(at)
    return list(items(file, at))


@given(
    values=st.lists(VALUES, max_size=5),
    indent=st.sampled_from([None, 0, 2]),
    plain=st.booleans(),
    blanks=st.sampled_from(["", " \r\n\t"]),
    chunk=st.sampled_from([1, 2, 7, 2**20]),
)
def test_items_are_those_of_json(
    values: list[Any], indent: int | None, plain: bool, blanks: str, chunk: int
) -> None:
    text = blanks + json.dumps(values, indent=indent, ensure_ascii=plain) + blanks
    data = text.encode("utf-8", "surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "_CHUNK_BYTES", chunk)
        found = _items(data)
        assert not any(set(value) & set(b"\r\n") for _, value in found)
        assert [json.loads(value) for _, value in found] == values
        for number, (at, _) in enumerate(found):
            assert _items(data, at) == found[number:]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[", "no value at byte 1 "),
        ("[1", "a value without an end at byte 1 "),
        ("[1 ", "no ',' at byte 3 "),
        ("[1,]", "no value at byte 3 "),
        ("[,1]", "no value at byte 1 "),
        ("[1 2]", "no ',' at byte 3 "),
        ("[1}", "no ',' at byte 2 "),
        ("[{}]]", "more after the array's end at byte 4 "),
        ('[{"a": "b}]', "a value without an end at byte 1 "),
        ('[{"a": "b\n"}]', "a value with a text without an end at byte 1 "),
        ('[{"a": "b\\', "a value without an end at byte 1 "),
        ("{}", r"no '\[' at byte 0 "),
    ],
)
@pytest.mark.parametrize("chunk", [1, 2**20])
def test_items_of_what_is_no_array(
    monkeypatch: pytest.MonkeyPatch, text: str, why: str, chunk: int
) -> None:
    monkeypatch.setattr(json_array, "_CHUNK_BYTES", chunk)
    with pytest.raises(pa.ArrowInvalid, match=why):
        _items(text.encode())


@pytest.mark.parametrize(
    ("text", "expected"),
    [("[]", True), ("\ufeff \n[", True), ('{"a": []}', False), ("", False), (" \n", False)],
)
def test_begins_array_takes_nothing(text: str, expected: bool) -> None:
    file = _opened(text.encode())
    assert begins_array(file) is expected
    assert file.read() == text.encode()
