"""reading: a shard's rows, or the reason why there are none; never other rows, never fewer."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import random
import re
import tempfile
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rayreward.errors import DataError
from rayreward.reading import read_shard
from rayreward.shards import Plan, plan_dataset
from rayreward.types import Status

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "naïve", "日本"]
NOT_UTF8 = b"caf\xe9"


def _rows(count: int) -> list[dict[str, Any]]:
    draw = random.Random(1)

    def text(words: int) -> str:
        return " ".join(draw.choices(WORDS, k=words))

    return [
        {
            "messages": [{"role": "user", "content": text(5)}, {"role": "assistant"}][: i % 3],
            "text": text(9),
            "id": i,
        }
        for i in range(count)
    ]


ROWS = _rows(24)
TABLE = pa.Table.from_pylist(ROWS)
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def _parquet(path: Path, table: pa.Table = TABLE, **options: Any) -> Path:
    pq.write_table(table, path, row_group_size=8, **options)
    return path


def _ipc(path: Path, table: pa.Table = TABLE, **options: Any) -> Path:
    new = pa.ipc.new_stream if path.suffix == ".arrows" else pa.ipc.new_file
    with new(str(path), table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=8)
    return path


def _lines(path: Path) -> Path:
    with pa.output_stream(str(path), compression="detect") as stream:
        stream.write(LINES)
    return path


WRITERS: dict[str, Callable[[Path], Path]] = {
    **{
        f"parquet {codec}": lambda at, codec=codec: _parquet(at / "x.parquet", compression=codec)
        for codec in ("none", "snappy", "gzip", "zstd", "lz4", "brotli")
    },
    "parquet checksums": lambda at: _parquet(
        at / "x.parquet", compression="none", write_page_checksum=True
    ),
    **{
        f"arrow {suffix} {codec}": lambda at, suffix=suffix, codec=codec: _ipc(
            at / f"x.{suffix}", compression=codec
        )
        for suffix in ("arrow", "arrows")
        for codec in (None, "lz4", "zstd")
    },
    **{
        name: lambda at, name=name: _lines(at / name)
        for name in ("x.jsonl", "x.jsonl.gz", "x.jsonl.zst")
    },
}


def _replace(path: str, data: bytes) -> None:
    """Changes a file behind the plan's back, as a bad disk does."""
    stat = os.stat(path)
    Path(path).write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _flip(path: str, at: int, bit: int = 0) -> None:
    data = bytearray(Path(path).read_bytes())
    data[at] ^= 1 << bit
    _replace(path, bytes(data))


def _rows_of(plan: Plan, shard: int = 0) -> pa.Table:
    """A shard's rows, all of which can be decoded."""
    table, lost = read_shard(plan.shards[shard], plan.schema)
    assert lost == {}
    return table


def _tables(plan: Plan) -> list[pa.Table]:
    return [_rows_of(plan, shard) for shard in range(len(plan.shards))]


def _lost(plan: Plan, shard: int = 0) -> str:
    """Why none of a shard's rows can be decoded."""
    table, lost = read_shard(plan.shards[shard], plan.schema)
    assert list(lost) == list(range(table.num_rows)) == list(range(plan.shards[shard].rows))
    assert {failure.status for failure in lost.values()} == {Status.UNREADABLE}
    assert all(column.null_count == table.num_rows for column in table.columns)
    return lost[0].detail


def _outcomes(plan: Plan) -> list[dict[str, Any] | None]:
    """Each row, or nothing where it can't be decoded."""
    found: list[dict[str, Any] | None] = []
    for shard in plan.shards:
        table, lost = read_shard(shard, plan.schema)
        rows = enumerate(table.to_pylist())
        found += [None if number in lost else row for number, row in rows]
    return found


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("size", [5, 8, 100])
def test_read_shard_gives_the_rows_that_were_planned(tmp_path: Path, kind: str, size: int) -> None:
    plan = plan_dataset(str(WRITERS[kind](tmp_path)), size)
    tables = _tables(plan)
    assert all(table.schema == plan.schema for table in tables)
    assert _pruned([row for table in tables for row in table.to_pylist()]) == _pruned(ROWS)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".arrows", ".jsonl", ".jsonl.gz"])
@given(
    files=st.lists(st.lists(st.integers(0, 6), max_size=4), min_size=1, max_size=5),
    size=st.integers(1, 30),
)
@settings(deadline=None, max_examples=30)
def test_any_split_into_files_groups_and_shards_gives_the_same_rows(
    suffix: str, files: list[list[int]], size: int
) -> None:
    """`files` holds for each file how many rows are in each of its row groups."""
    total = sum(map(sum, files))
    assume(total)
    table = pa.table({"id": range(total), "text": [f"row {n} é" for n in range(total)]})
    with tempfile.TemporaryDirectory() as folder:
        start = 0
        for number, groups in enumerate(files):
            tables = [table.slice(start + sum(groups[:at]), n) for at, n in enumerate(groups)]
            _write_groups(f"{folder}/{number}{suffix}", tables, table.schema)
            start += sum(groups)
        plan = plan_dataset(folder, size)
        tables = _tables(plan)
        assert [part.num_rows for part in tables[:-1]] == [size] * ((total - 1) // size)
        assert pa.concat_tables(tables).equals(table)
        for shard in plan.shards:
            for cut in range(1, shard.rows):
                halves = shard.slice(0, cut), shard.slice(cut, shard.rows - cut)
                found = pa.concat_tables(read_shard(half, plan.schema)[0] for half in halves)
                assert found.equals(tables[shard.index])


def _write_groups(path: str, groups: list[pa.Table], schema: pa.Schema) -> None:
    """A file with these row groups, record batches, or lines."""
    if ".jsonl" in path:
        rows = (row for group in groups for row in group.to_pylist())
        with pa.output_stream(path, compression="detect") as stream:
            stream.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        return
    new = {"parquet": pq.ParquetWriter, "arrow": pa.ipc.new_file, "arrows": pa.ipc.new_stream}
    with new[path.rsplit(".", 1)[1]](path, schema) as writer:
        for group in groups:
            writer.write_table(group)


def test_read_shard_a_slice_decodes_no_more_than_it_needs(tmp_path: Path) -> None:
    """The rows before it may be in one row group with it, and larger than memory."""
    rows = 200_000
    table = pa.table({"text": [f"{n:0500}" for n in range(rows)]})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=rows)
    plan = plan_dataset(str(tmp_path), 1_000)
    del table
    pa.default_memory_pool().release_unused()
    before = pa.total_allocated_bytes()
    peak = 0

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, pa.total_allocated_bytes() - before)

    done = threading.Event()
    watching = threading.Thread(target=watch)
    watching.start()
    found = _rows_of(plan, len(plan.shards) - 1)
    done.set()
    watching.join()
    assert found["text"][-1].as_py() == f"{rows - 1:0500}"
    assert peak < 20e6  # of 100 MB


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_lines_are_planned_and_read_without_holding_the_file(tmp_path: Path, name: str) -> None:
    rows = 40_000
    with pa.output_stream(str(tmp_path / name), compression="detect") as stream:
        for row in range(rows):
            stream.write(b'{"text": "%01000d"}\n' % row)
    tracemalloc.start()
    try:
        plan = plan_dataset(str(tmp_path), 1_000)
        found = _rows_of(plan, len(plan.shards) - 1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found["text"][-1].as_py() == f"{rows - 1:01000}"
    assert peak < 12e6  # of 40 MB


def _pruned(value: Any) -> Any:
    """Without null fields, which Arrow fills in."""
    if isinstance(value, dict):
        return {name: _pruned(item) for name, item in value.items() if item is not None}
    return [_pruned(item) for item in value] if isinstance(value, list) else value


def test_read_shard_puts_columns_in_the_order_of_the_plan(tmp_path: Path) -> None:
    _parquet(tmp_path / "a.parquet", pa.table({"text": ["a"], "id": [1]}))
    _parquet(tmp_path / "b.parquet", pa.table({"id": [2], "text": ["b"]}))
    plan = plan_dataset(str(tmp_path))
    assert _rows_of(plan).to_pylist() == [{"text": "a", "id": 1}, {"text": "b", "id": 2}]
    assert _rows_of(plan).schema.names == ["text", "id"]


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_read_shard_takes_nulls_that_only_some_files_allow(tmp_path: Path, names: str) -> None:
    strict = pa.schema([pa.field("text", pa.string(), nullable=False)])
    _parquet(tmp_path / f"{names[0]}.parquet", pa.table({"text": ["a"]}, schema=strict))
    _parquet(tmp_path / f"{names[1]}.parquet", pa.table({"text": pa.array([None], pa.string())}))
    plan = plan_dataset(str(tmp_path))
    tables = _tables(plan)
    assert all(table.schema == plan.schema for table in tables)
    (table,) = tables
    assert sorted(map(str, table["text"])) == ["None", "a"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_read_shard_fills_columns_that_another_file_has(tmp_path: Path, name: str) -> None:
    for other, line in ((name, '{"text": "a", "x": 1}'), ("b" + name, '{"text": "b", "y": [1.5]}')):
        with pa.output_stream(str(tmp_path / other), compression="detect") as stream:
            stream.write(line.encode())
    assert _outcomes(plan_dataset(str(tmp_path))) == [
        {"text": "a", "x": 1, "y": None},
        {"text": "b", "x": None, "y": [1.5]},
    ]


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
@pytest.mark.parametrize(
    "kind_of_text",
    [
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int8(), pa.string()),
        pa.dictionary(pa.int32(), pa.string()),
    ],
    ids=str,
)
def test_read_shard_takes_any_type_of_text(
    tmp_path: Path, kind: str, kind_of_text: pa.DataType
) -> None:
    table = pa.table({"text": pa.array(["a", "bb", None, "a" * 50] * 5)})
    table = table.cast(pa.schema([("text", kind_of_text)]))
    write = _parquet if kind == "parquet" else _ipc
    suffix = {"parquet": ".parquet", "file": ".arrow", "stream": ".arrows"}[kind]
    plan = plan_dataset(str(write(tmp_path / f"x{suffix}", table)), 3)
    expected = pa.large_string() if kind_of_text == pa.string_view() else kind_of_text
    assert plan.schema.field("text").type == expected
    tables = _tables(plan)
    assert [row for part in tables for row in part.to_pylist()] == table.to_pylist()


def test_read_shard_whose_file_has_changed(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "x.parquet")
    plan = plan_dataset(str(path))
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(DataError, match=r"x\.parquet has changed since the job was planned"):
        read_shard(plan.shards[0], plan.schema)
    _replace(str(path), path.read_bytes() + b"\0")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DataError, match=r"x\.parquet has changed since the job was planned"):
        read_shard(plan.shards[0], plan.schema)


@pytest.mark.parametrize("kind", WRITERS)
def test_read_shard_whose_file_is_gone(tmp_path: Path, kind: str) -> None:
    path = WRITERS[kind](tmp_path)
    plan = plan_dataset(str(path))
    path.unlink()
    with pytest.raises(DataError, match="can't be read on this machine .*under the same path"):
        read_shard(plan.shards[0], plan.schema)


def test_read_shard_whose_file_vanishes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("parquet zstd", "arrow arrow None", "x.jsonl", "x.jsonl.gz"):
        path = WRITERS[kind](tmp_path)
        plan = plan_dataset(str(path))
        stat = path.stat()
        path.unlink()
        with monkeypatch.context() as patched:
            patched.setattr(os, "stat", lambda _path, stat=stat: stat)
            with pytest.raises(DataError, match="can't be read: .*No such file"):
                read_shard(plan.shards[0], plan.schema)


def test_read_shard_whose_disk_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_dataset(str(_parquet(tmp_path / "x.parquet")))

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", fail)
    with pytest.raises(DataError, match=r"x\.parquet can't be read: Input/output error"):
        read_shard(plan.shards[0], plan.schema)


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "zstd", "lz4", "brotli"])
def test_read_shard_one_damaged_row_group_spares_the_others(tmp_path: Path, codec: str) -> None:
    path = str(_parquet(tmp_path / "x.parquet", compression=codec, write_page_checksum=True))
    plan = plan_dataset(path, 4)
    whole = _outcomes(plan)
    column = pq.read_metadata(path).row_group(1).column(2)
    start = column.dictionary_page_offset or column.data_page_offset
    _flip(path, start + column.total_compressed_size // 2)
    assert _outcomes(plan) == [*whole[:8], *[None] * 8, *whole[16:]]
    assert _outcomes(plan_dataset(path, 4)) == [*whole[:8], *[None] * 8, *whole[16:]]


def test_read_shard_one_damaged_batch_spares_the_others(tmp_path: Path) -> None:
    path = str(_ipc(tmp_path / "x.arrow", compression="zstd"))
    plan = plan_dataset(path, 4)
    whole = _outcomes(plan)
    data = Path(path).read_bytes()
    frames = [at for at in range(len(data)) if data.startswith(b"\x28\xb5\x2f\xfd", at)]
    _flip(path, frames[len(frames) // 2])  # in the second of three batches
    assert _outcomes(plan) == [*whole[:8], *[None] * 8, *whole[16:]]


@pytest.mark.parametrize("kind", [kind for kind in WRITERS if kind != "x.jsonl"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_plan_refuses_a_file_that_is_cut_off(tmp_path: Path, kind: str, share: float) -> None:
    path = WRITERS[kind](tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(
        DataError, match=r"is not a readable \w.* file: .* It may be cut off|is empty"
    ):
        plan_dataset(str(path))


def test_plan_refuses_lines_that_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(LINES[:-20])
    with pytest.raises(DataError, match=r"x\.jsonl, line 24 can't be read as a JSON object"):
        plan_dataset(str(path))


@pytest.mark.parametrize("kind", WRITERS)
def test_reading_survives_a_flipped_bit_anywhere(tmp_path: Path, kind: str) -> None:
    path = str(WRITERS[kind](tmp_path))
    plan = plan_dataset(path, 8)
    data = Path(path).read_bytes()
    draw = random.Random(2)
    tail = max(len(data) - 1000, 0)  # where Parquet and Arrow files keep what the rest hangs on
    places = draw.sample(range(len(data)), 15) + draw.sample(range(tail, len(data)), 15)
    for at in places:
        _replace(path, data)
        _flip(path, at, draw.randrange(8))
        _read_as_it_goes(plan)
        with contextlib.suppress(DataError):
            _read_as_it_goes(plan_dataset(path, 8))


def _read_as_it_goes(plan: Plan) -> None:
    """Each shard has all of its rows, fit to be passed on, or is known to be damaged."""
    assert sum(shard.rows for shard in plan.shards) == plan.rows
    for shard in plan.shards:
        table, _ = read_shard(shard, plan.schema)
        assert table.num_rows == shard.rows
        pq.write_table(table, io.BytesIO())


@pytest.mark.parametrize("kind", ["parquet none", "arrow arrow None", "arrow arrows None"])
def test_read_shard_leaves_text_that_is_not_utf8_to_its_rows(tmp_path: Path, kind: str) -> None:
    bad = pa.array([b"good", NOT_UTF8, b"fine"]).view(pa.string())
    turn = pa.StructArray.from_arrays([bad, bad], names=["role", "content"])
    nested = pa.ListArray.from_arrays([0, 1, 2, 3], turn)
    table = pa.table({"text": bad, "turns": nested, "kind": bad.dictionary_encode()})
    write, name = (_parquet, "x.parquet") if "parquet" in kind else (_ipc, f"x.{kind.split()[1]}")
    plan = plan_dataset(str(write(tmp_path / name, table)))
    rows = _rows_of(plan)
    assert rows.slice(0, 1).to_pylist() == [
        {"text": "good", "turns": [{"role": "good", "content": "good"}], "kind": "good"}
    ]
    assert rows["text"][2].as_py() == "fine"
    for name in rows.column_names:
        with pytest.raises(UnicodeDecodeError):
            rows[name][1].as_py()


def _mapped(tmp_path: Path, array: pa.Array) -> Path:
    """An Arrow file with an array in it that pyarrow would not have made."""
    batch = pa.RecordBatch.from_arrays([pa.array(["a"] * len(array)), array], names=["text", "x"])
    with pa.ipc.new_file(str(tmp_path / "x.arrow"), batch.schema) as writer:
        writer.write_batch(batch)
    return tmp_path / "x.arrow"


def test_read_shard_bad_text_does_not_hide_bad_offsets(tmp_path: Path) -> None:
    # pyarrow looks at the items of a list before the offsets, and stops at the first fault
    bad = pa.array([NOT_UTF8] * 4).view(pa.string())
    path = _mapped(tmp_path, pa.ListArray.from_arrays([0, 1, 3, 4], bad))
    plan = plan_dataset(str(path))
    read_shard(plan.shards[0], plan.schema)
    offsets = b"".join(n.to_bytes(4, "little") for n in (0, 1, 3, 4))
    data = path.read_bytes()
    _replace(str(path), data.replace(offsets, offsets[:8] + b"\0\0\0\x64" + offsets[12:]))
    assert re.search("the rows don't hold together: .*out of bounds", _lost(plan))


def test_read_shard_bad_text_does_not_hide_bad_indices(tmp_path: Path) -> None:
    bad = pa.array([NOT_UTF8, b"ok"]).view(pa.string())
    indices = pa.array([0, 1, 1, 0], pa.int32())
    path = _mapped(tmp_path, pa.DictionaryArray.from_arrays(indices, bad))
    plan = plan_dataset(str(path))
    read_shard(plan.shards[0], plan.schema)
    data, told = path.read_bytes(), indices.buffers()[1].to_pybytes()
    _replace(str(path), data.replace(told, told[:4] + b"\0\0\0\x64" + told[8:]))
    assert re.search("the rows don't hold together: .*out of bounds", _lost(plan))


def test_read_shard_text_in_a_type_that_can_not_be_taken_apart(tmp_path: Path) -> None:
    bad = pa.array([NOT_UTF8, b"ok"]).view(pa.string())
    path = _mapped(tmp_path, pa.FixedSizeListArray.from_arrays(bad, 1))
    plan = plan_dataset(str(path))
    assert re.search("is not valid UTF-8", _lost(plan))


def test_read_shard_whose_schema_is_another_by_now(tmp_path: Path) -> None:
    path = _ipc(tmp_path / "x.arrow")
    plan = plan_dataset(str(path))
    _replace(str(path), path.read_bytes().replace(b"text", b"next"))
    assert re.search("text", _lost(plan))


@pytest.mark.parametrize(
    "second", ["", "null", '"text"', '{"text": "b"', '{"text": "b", "x": 1}', "[" * 999]
)
def test_read_shard_whose_lines_are_others_by_now(tmp_path: Path, second: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n' + '{"text": "b"}'.ljust(1000))
    plan = plan_dataset(str(path), 2)
    _replace(str(path), ('{"text": "a"}\n' + second.ljust(1000)).encode())
    assert _lost(plan)


def test_plan_names_are_not_utf8(tmp_path: Path) -> None:
    path = _ipc(tmp_path / "x.arrow")
    data = path.read_bytes()
    for name in (b"content", b"id\0\0"):  # within messages, and a column
        path.write_bytes(data.replace(name, b"\xff\xfe" + name[2:]))
        with pytest.raises(DataError, match=r"x\.arrow is not a readable Arrow IPC file: .*utf-8"):
            plan_dataset(str(path))
