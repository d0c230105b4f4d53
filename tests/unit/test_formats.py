"""formats: the rows that go into a file come out of its pieces, however it is cut and packed."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayreward.errors import DataError
from rayreward.formats import (
    EXTENSIONS,
    Damaged,
    Format,
    Piece,
    Scan,
    format_named,
    format_of,
    json_lines,
    settle,
)

GROUP_ROWS = 5
ROWS: list[dict[str, Any]] = [
    {
        "prompt": f'Frage {i} – 日本\n"x" {{[\\',
        "messages": [{"role": "user", "content": f"m{k}"} for k in range(i % 3)],
        "score": i / 4,
        "id": i,
        "note": None if i % 4 else f"note {i}",
    }
    for i in range(23)
]
TABLE = pa.Table.from_pylist(ROWS)


def _jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _array(rows: list[dict[str, Any]], indent: int | None = None) -> bytes:
    return json.dumps(rows, ensure_ascii=False, indent=indent).encode()


def _pack(path: Path, content: bytes, codec: str | None) -> None:
    with pa.output_stream(str(path), compression=codec) as stream:
        stream.write(content)


def _write_ipc(path: Path, table: pa.Table, new: Callable[..., Any], **options: Any) -> None:
    with new(str(path), table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=GROUP_ROWS)


WRITERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "parquet": ("x.parquet", lambda path: pq.write_table(TABLE, path, row_group_size=GROUP_ROWS)),
    "arrow file": ("x.arrow", lambda path: _write_ipc(path, TABLE, pa.ipc.new_file)),
    "arrow file, zstd": (
        "x.feather",
        lambda path: _write_ipc(path, TABLE, pa.ipc.new_file, compression="zstd"),
    ),
    "arrow stream": ("x.arrow", lambda path: _write_ipc(path, TABLE, pa.ipc.new_stream)),
    "arrow stream, lz4": (
        "x.arrows",
        lambda path: _write_ipc(path, TABLE, pa.ipc.new_stream, compression="lz4"),
    ),
    "json lines": ("x.jsonl", lambda path: path.write_bytes(_jsonl(ROWS))),
    "json lines, gzip": ("x.jsonl.gz", lambda path: _pack(path, _jsonl(ROWS), "gzip")),
    "json lines, zstd": ("x.json.zst", lambda path: _pack(path, _jsonl(ROWS), "zstd")),
    "json lines, shouted": ("X.JSONL.GZ", lambda path: _pack(path, _jsonl(ROWS), "gzip")),
    "json array": ("x.json", lambda path: path.write_bytes(_array(ROWS))),
    "json array, pretty": ("x.json", lambda path: path.write_bytes(_array(ROWS, indent=2))),
    "json array, gzip": ("x.json.gz", lambda path: _pack(path, _array(ROWS), "gzip")),
}


@pytest.fixture(params=sorted(WRITERS))
def written(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The path of `ROWS` in one format or another."""
    name, write = WRITERS[request.param]
    write(tmp_path / name)
    return str(tmp_path / name)


def _form(path: str) -> Format:
    form = format_of(path)
    assert form is not None
    return form


def _pieces(scan: Scan, size: int) -> list[Piece]:
    """All pieces of a file, cut into some of at most `size` rows."""
    return [
        piece.slice(start, min(size, piece.rows - start))
        for piece in scan.pieces
        for start in range(0, piece.rows, size)
    ]


def _read(path: str, size: int = 1000) -> list[dict[str, Any]]:
    """All rows of a file, piece by piece."""
    form = _form(path)
    scan = form.scan(path)
    pieces = _pieces(scan, size)
    tables = [form.read(path, piece, settle(scan.schema)) for piece in pieces]
    assert [table.num_rows for table in tables] == [piece.rows for piece in pieces]
    return [row for table in tables for row in table.to_pylist()]


def _lines(tmp_path: Path, *lines: str | bytes, end: bytes = b"\n", name: str = "x.jsonl") -> str:
    """A file of lines; the last one has no end."""
    path = tmp_path / name
    path.write_bytes(end.join(x.encode() if isinstance(x, str) else x for x in lines))
    return str(path)


@pytest.mark.parametrize("size", [1, 3, GROUP_ROWS, 7, 23, 1000])
def test_formats_read_back_what_was_written(written: str, size: int) -> None:
    assert _read(written, size) == ROWS


def test_formats_scan_the_columns_in_their_order(written: str) -> None:
    scan = _form(written).scan(written)
    assert scan.schema.names == TABLE.schema.names
    assert scan.schema.types == TABLE.schema.types
    assert scan.rows == len(ROWS)


def test_formats_read_pieces_in_any_order(written: str) -> None:
    form = _form(written)
    scan = form.scan(written)
    pieces = _pieces(scan, 4)
    found = {p: form.read(written, p, scan.schema).to_pylist() for p in reversed(pieces)}
    assert [row for piece in pieces for row in found[piece]] == ROWS


@pytest.mark.parametrize("kind", ["parquet", "arrow file", "arrow stream"])
def test_formats_have_a_piece_a_row_group_or_record_batch(tmp_path: Path, kind: str) -> None:
    name, write = WRITERS[kind]
    write(tmp_path / name)
    pieces = _form(name).scan(str(tmp_path / name)).pieces
    assert pieces == (*(Piece(GROUP_ROWS, at) for at in range(4)), Piece(3, 4))
    assert pieces[1].slice(2, 3) == Piece(3, 1, 2)
    assert pieces[1].slice(2, 3).slice(1, 1) == Piece(1, 1, 3)


def test_formats_find_plain_lines_at_byte_offsets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _lines(tmp_path, '{"text": "a"}', "", '{"text": "é"}', '{"text": "c"}')
    assert _form(path).scan(path).pieces == (Piece(3, 0),)
    monkeypatch.setattr(json_lines, "_BLOCK_BYTES", 1)
    assert _form(path).scan(path).pieces == (Piece(1, 0), Piece(1, 14), Piece(1, 30))


def test_formats_find_items_at_byte_offsets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _lines(tmp_path, '[{"text": "a"},', '  {"text": "é"}, {"text": "c"}]', name="x.json")
    assert _form(path).scan(path).pieces == (Piece(3, 0),)
    monkeypatch.setattr(json_lines, "_BLOCK_BYTES", 1)
    assert _form(path).scan(path).pieces == (Piece(1, 0), Piece(1, 14), Piece(1, 32))
    assert _read(path) == [{"text": "a"}, {"text": "é"}, {"text": "c"}]


def test_formats_find_packed_lines_by_counting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_lines, "_BLOCK_BYTES", 1)
    path = tmp_path / "x.jsonl.gz"
    _pack(path, _jsonl(ROWS), "gzip")
    assert _form(str(path)).scan(str(path)).pieces == (Piece(len(ROWS), 0),)


@pytest.mark.parametrize("extension", sorted(EXTENSIONS))
def test_formats_are_told_by_extension_whatever_its_case(extension: str) -> None:
    assert format_of(f"/data/a.b{extension}") is EXTENSIONS[extension]
    assert format_of(f"/data/a.b{extension.upper()}") is EXTENSIONS[extension]
    assert format_named(EXTENSIONS[extension].name) is EXTENSIONS[extension]


@pytest.mark.parametrize("name", ["x", "x.csv", "x.parquet.bak", "x.gz", "jsonl"])
def test_formats_unknown_extension_is_none(name: str) -> None:
    assert format_of(name) is None


@pytest.mark.parametrize("kind", ["parquet", "arrow file", "arrow stream"])
def test_formats_file_with_a_schema_but_no_rows_has_no_pieces(tmp_path: Path, kind: str) -> None:
    empty = TABLE.schema.empty_table()
    path = str(tmp_path / WRITERS[kind][0])
    if kind == "parquet":
        pq.write_table(empty, path)
    else:
        _write_ipc(Path(path), empty, pa.ipc.new_file if "file" in kind else pa.ipc.new_stream)
    scan = _form(path).scan(path)
    assert (scan.schema.names, scan.rows) == (TABLE.schema.names, 0)
    assert _read(path) == []


@pytest.mark.parametrize(
    "content", [b"", b"\n\r\n \t\n", b" []\n"], ids=["no bytes", "blank lines", "an empty array"]
)
@pytest.mark.parametrize(
    ("name", "codec"), [("x.jsonl", None), ("x.jsonl.gz", "gzip"), ("x.jsonl.zst", "zstd")]
)
def test_formats_json_without_lines_has_no_pieces(
    tmp_path: Path, content: bytes, name: str, codec: str | None
) -> None:
    path = tmp_path / name
    _pack(path, content, codec)
    assert _form(name).scan(str(path)).rows == 0
    assert _read(str(path)) == []


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_formats_no_bytes_are_damaged_where_a_schema_belongs(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(Damaged):
        _form(name).scan(str(tmp_path / name))


def test_formats_missing_file_is_no_damage(tmp_path: Path) -> None:
    for name in ("x.parquet", "x.arrow", "x.jsonl", "x.jsonl.gz"):
        form, path = _form(name), str(tmp_path / name)
        with pytest.raises(FileNotFoundError):
            form.scan(path)
        with pytest.raises(FileNotFoundError):
            form.read(path, Piece(1, 0), pa.schema([("text", pa.string())]))


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("size", [1, 2, 9])
def test_formats_json_passes_over_blank_lines(tmp_path: Path, end: bytes, size: int) -> None:
    lines = ["", '{"text": "a"}', "", "  \t", '{"text": "b"}', '{"text": "c"}']
    expected = [{"text": "a"}, {"text": "b"}, {"text": "c"}]
    assert _read(_lines(tmp_path, *lines, end=end), size) == expected
    assert _read(_lines(tmp_path, *lines, "", "", end=end), size) == expected


@pytest.mark.parametrize("size", [1, 9])
def test_formats_json_passes_over_byte_order_marks(tmp_path: Path, size: int) -> None:
    path = _lines(tmp_path, "\ufeff" + '{"text": "a"}', "\ufeff" + '{"text": "\ufeffb"}')
    assert _read(path, size) == [{"text": "a"}, {"text": "\ufeffb"}]
    path = _lines(tmp_path, '\ufeff [{"text": "a"}, {"text": "\ufeffb"}]', name="x.json")
    assert _read(path, size) == [{"text": "a"}, {"text": "\ufeffb"}]


def test_formats_json_leaves_text_that_looks_like_a_date(tmp_path: Path) -> None:
    dates = ["2024-01-01", "2024-01-01 00:00:00", "2024-01-01T00:00:00Z", "12:30:00"]
    rows = [{"text": date, "turns": [{"content": date}], "tags": [date]} for date in dates]
    path = _lines(tmp_path, *map(json.dumps, rows))
    assert _read(path, 1) == _read(path) == rows


@pytest.mark.parametrize("block", [10, 2**24])
@pytest.mark.parametrize("size", [2, 100])
def test_formats_json_key_that_comes_late_is_a_column_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, size: int
) -> None:
    monkeypatch.setattr(json_lines, "_BLOCK_BYTES", block)
    path = _lines(tmp_path, *['{"text": "a"}'] * 30, '{"text": "b", "late": 1}')
    assert _read(path, size) == [{"text": "a", "late": None}] * 30 + [{"text": "b", "late": 1}]


@pytest.mark.parametrize("block", [10, 2**24])
@pytest.mark.parametrize("size", [1, 2, 100])
def test_formats_json_messages_may_have_differing_fields(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, size: int
) -> None:
    monkeypatch.setattr(json_lines, "_BLOCK_BYTES", block)
    turns: list[Any] = [
        None,
        [],
        [{"role": "user", "content": "2024-01-01"}],
        [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}, {"role": "x"}],
        [None, {"role": "tool", "name": "f", "tool_calls": [{"args": {"n": 1}}]}],
        [],
    ]
    path = _lines(tmp_path, *(json.dumps({"messages": turn}) for turn in turns))
    assert [_pruned(row["messages"]) for row in _read(path, size)] == _pruned(turns)


def _pruned(value: Any) -> Any:
    """Without null fields, which Arrow fills in."""
    if isinstance(value, dict):
        return {name: _pruned(item) for name, item in value.items() if item is not None}
    return [_pruned(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("block", [10, 2**24])
@pytest.mark.parametrize("size", [1, 9])
def test_formats_json_integers_become_floats_where_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, size: int
) -> None:
    monkeypatch.setattr(json_lines, "_BLOCK_BYTES", block)
    path = _lines(tmp_path, '{"text": "a", "x": 1}', '{"text": "b", "x": 2.5}')
    assert _form(path).scan(path).schema.field("x").type == pa.float64()
    assert [row["x"] for row in _read(path, size)] == [1.0, 2.5]


@pytest.mark.parametrize("size", [1, 2, 9])
def test_formats_json_keeps_nulls_in_lists(tmp_path: Path, size: int) -> None:
    # pyarrow drops the first null of a list whose type it has yet to find
    rows: list[dict[str, Any]] = [
        {"text": "a", "tags": [None, None], "ids": [None, 1], "turns": [None, {"role": "x"}]},
        {"text": "b", "tags": [], "ids": [None], "turns": []},
        {"text": "c", "tags": None, "ids": None, "turns": [None]},
    ]
    assert _read(_lines(tmp_path, *map(json.dumps, rows)), size) == rows


def test_formats_json_settles_what_was_always_null_as_text() -> None:
    inner = pa.list_(pa.struct([("a", pa.null()), ("b", pa.int64())]))
    settled = settle(pa.schema([("x", pa.null()), ("y", inner)]))
    inner = pa.list_(pa.struct([("a", pa.string()), ("b", pa.int64())]))
    assert settled == pa.schema([("x", pa.string()), ("y", inner)])


def test_formats_json_parses_a_long_piece_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "x.jsonl")
    Path(path).write_bytes(_jsonl(ROWS))
    schema = _form(path).scan(path).schema
    monkeypatch.setattr(json_lines, "_PARSE_BYTES", 1000)
    table = _form(path).read(path, Piece(len(ROWS), 0), schema)
    assert table.column(0).num_chunks > 1
    assert table.to_pylist() == ROWS


@pytest.mark.parametrize(
    "line",
    [
        "null",
        "5",
        '"text"',
        "true",
        '{"text": "a"',
        '{"text": "a"},',
        '{"text": "a"} {"text": "b"}',
        '{"text": "a"} null',
        '{"text": "a"}}{"row":{"text": "b"}',
        '{"text": "a", "text": "b"}',
        '{"text": "a", "x": NULL}',
        r'{"text": "\ud800"}',
        "\0\0\0",
        '{"text": "a", "x": ' + "[" * 101 + "]" * 101 + "}",
        '{"x": ' * 200_000,
    ],
    ids=lambda line: line[:30],
)
@pytest.mark.parametrize("before", [0, 3])
def test_formats_json_names_the_line_that_is_no_object(
    tmp_path: Path, line: str, before: int
) -> None:
    # some of them end the process where pyarrow is handed them as they are
    path = _lines(tmp_path, *['{"text": "a"}', ""][:before] * before, line, '{"text": "b"}')
    number = Path(path).read_text().split("\n").index(line) + 1
    with pytest.raises(DataError, match=rf"x\.jsonl, line {number} can't be read as a JSON object"):
        _form(path).scan(path)


@pytest.mark.parametrize("line", ['["a"]', '[{"text": "a"}]'])
def test_formats_json_array_among_lines_is_no_object(tmp_path: Path, line: str) -> None:
    path = _lines(tmp_path, '{"text": "a"}', line)
    with pytest.raises(DataError, match=r"x\.jsonl, line 2 can't be read as a JSON object"):
        _form(path).scan(path)


@pytest.mark.parametrize(
    "item",
    [
        "null",
        "5",
        '"text"',
        '["a"]',
        '[{"text": "b"}]',
        '{"text": "b",}',
        '{"x": NULL}',
        '{"x": 1]',
    ],
)
def test_formats_json_names_the_item_that_is_no_object(tmp_path: Path, item: str) -> None:
    path = _lines(tmp_path, f'[{{"text": "a"}},\n{item}, {{"text": "c"}}]', name="x.json")
    with pytest.raises(DataError, match=r"x\.json, item 2 can't .* Repair or remove the item\."):
        _form(path).scan(path)


def test_formats_json_object_spread_over_lines_is_refused(tmp_path: Path) -> None:
    pretty = json.dumps({"text": "a"}, indent=1)
    with pytest.raises(DataError, match=r"line 1 can't be read .* Repair or remove the line\."):
        _form("x.json").scan(_lines(tmp_path, pretty, name="x.json"))


def test_formats_json_array_that_is_cut_off_is_damaged(tmp_path: Path) -> None:
    path = _lines(tmp_path, json.dumps(ROWS, indent=1)[:-10], name="x.json")
    with pytest.raises(Damaged, match="a value without an end at byte"):
        _form(path).scan(path)


def test_formats_json_brackets_in_text_are_no_depth(tmp_path: Path) -> None:
    text = '[{"\\' * 1000
    path = _lines(tmp_path, json.dumps({"text": text, "x": [[1]] * 200}))
    assert _read(path) == [{"text": text, "x": [[1]] * 200}]


def test_formats_json_takes_a_hundred_levels(tmp_path: Path) -> None:
    path = _lines(tmp_path, '{"text": "a", "x": ' + "[" * 99 + "]" * 99 + "}")
    assert len(_read(path)) == 1


def test_formats_json_names_the_line_that_is_not_utf8(tmp_path: Path) -> None:
    path = _lines(tmp_path, '{"text": "a"}', "", b'{"text": "\xff"}', '{"text": "b"}')
    with pytest.raises(DataError, match=r"line 3 is not valid UTF-8 .* at byte 10 of the line"):
        _form(path).scan(path)


def test_formats_json_counts_lines_across_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_lines, "_BLOCK_BYTES", 20)
    path = _lines(tmp_path, *['{"text": "a"}', ""] * 5, "nonsense")
    with pytest.raises(DataError, match="line 11 can't"):
        _form(path).scan(path)


@pytest.mark.parametrize(
    ("block", "where"), [(10, "before and after line 2"), (2**24, "lines 1 to 2")]
)
def test_formats_json_column_of_two_types_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, where: str
) -> None:
    monkeypatch.setattr(json_lines, "_BLOCK_BYTES", block)
    path = _lines(tmp_path, '{"text": "a", "x": "1"}', '{"text": "b", "x": 1}')
    with pytest.raises(DataError, match=rf"{where}.*\bx\b.*Give each column one type"):
        _form(path).scan(path)


def test_formats_gzip_members_are_read_one_after_the_other(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n') + gzip.compress(b'{"text": "b"}\n'))
    assert _read(str(path)) == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda data: data[:-8], "no end marker"),
        (lambda data: data + data, "ends after"),
        (lambda data: data[:-3], "decoded"),
    ],
    ids=["no end", "two streams", "cut"],
)
def test_formats_arrow_stream_must_be_whole(
    tmp_path: Path, change: Callable[[bytes], bytes], why: str
) -> None:
    path = tmp_path / "x.arrows"
    _write_ipc(path, TABLE, pa.ipc.new_stream)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(Damaged, match=why):
        _form(str(path)).scan(str(path))


def test_formats_parquet_footer_must_agree_with_its_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(TABLE, path, row_group_size=len(ROWS))
    data = path.read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    field = b"\x16" + bytes([2 * len(ROWS)])  # rows of the file: a zigzag varint in field 3
    at = data.index(field, footer)
    path.write_bytes(data[: at + 1] + bytes([2 * len(ROWS) - 2]) + data[at + 2 :])
    assert pq.read_metadata(path).num_rows == len(ROWS) - 1
    with pytest.raises(Damaged, match="22 rows by its footer, 23 by its groups"):
        _form(str(path)).scan(str(path))
