"""shards: finding the files of a dataset, checking that they fit together, cutting them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from columns_of_all_types import REFUSED

from rayreward.errors import DataError
from rayreward.finding import find_files
from rayreward.formats import Piece
from rayreward.preferences import RowKind
from rayreward.reading import read_shard
from rayreward.shards import Shard, plan_dataset


def _table(rows: int) -> pa.Table:
    return pa.table({"text": pa.array([f"row {i}" for i in range(rows)], pa.string())})


def _parquet(path: Path, table: pa.Table | int, row_group_size: int = 10_000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = _table(table) if isinstance(table, int) else table
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def _jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _names(dataset: Path | str, root: Path) -> list[str]:
    return [os.path.relpath(path, root) for path in find_files(str(dataset))]


def _saved(directory: Path, rows: list[int]) -> Path:
    """The layout that `datasets.save_to_disk` writes."""
    directory.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(rows):05d}.arrow" for i in range(len(rows))]
    for name, count in zip(names, rows, strict=True):
        with pa.ipc.new_stream(str(directory / name), _table(0).schema) as writer:
            writer.write_table(_table(count))
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "f"}
    (directory / "state.json").write_text(json.dumps(state))
    (directory / "dataset_info.json").write_text("{}")
    return directory


def test_find_files_one_file(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "a.parquet", 3)
    assert find_files(str(path)) == [str(path)]


def test_find_files_relative_to_here_and_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _parquet(tmp_path / "a.parquet", 3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for dataset in ("a.parquet", "./a.parquet", "~/a.parquet", "*.parquet", "~/*.parquet", "."):
        assert find_files(dataset) == [str(path)]


def test_find_files_directory_and_those_below_it_in_order(tmp_path: Path) -> None:
    for name in ("b.parquet", "a.parquet", "deep/er/c.parquet", "deep/a.parquet", "A.parquet"):
        _parquet(tmp_path / name, 1)
    expected = ["A.parquet", "a.parquet", "b.parquet", "deep/a.parquet", "deep/er/c.parquet"]
    assert _names(tmp_path, tmp_path) == expected


def test_find_files_passes_over_what_is_hidden_or_no_data(tmp_path: Path) -> None:
    for name in ("_a.parquet", ".a.parquet", "_temporary/a.parquet", ".cache/b/a.parquet"):
        _parquet(tmp_path / name, 1)
    for name in ("README.md", "x.parquet.crc", "LICENSE"):
        (tmp_path / name).touch()
    (tmp_path / "folder.parquet").mkdir()
    _parquet(tmp_path / "b_.parquet", 1)
    assert _names(tmp_path, tmp_path) == ["b_.parquet"]


def test_find_files_hidden_parents_do_not_hide(tmp_path: Path) -> None:
    _parquet(tmp_path / ".cache" / "_data" / "a.parquet", 1)
    assert _names(tmp_path / ".cache" / "_data", tmp_path) == [".cache/_data/a.parquet"]


def test_find_files_glob(tmp_path: Path) -> None:
    for name in ("b.parquet", "a.parquet", "c/d.parquet", "a.txt"):
        _parquet(tmp_path / name, 1)
    assert _names(tmp_path / "*.parquet", tmp_path) == ["a.parquet", "b.parquet"]
    assert _names(tmp_path / "[ab].parquet", tmp_path) == ["a.parquet", "b.parquet"]
    everything = ["a.parquet", "b.parquet", "c/d.parquet"]
    assert _names(tmp_path / "**" / "*.parquet", tmp_path) == everything
    assert _names(f"{tmp_path}/**/**/*.parquet", tmp_path) == everything


def test_find_files_brackets_in_a_name_are_no_pattern(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "a[1].parquet", 1)
    assert find_files(str(path)) == [str(path)]


def test_find_files_links_keep_their_names(tmp_path: Path) -> None:
    # as in the hub's cache, where the linked file is named by its hash
    blob = _parquet(tmp_path / "blobs" / "0a1b", 2)
    (tmp_path / "snapshot").mkdir()
    link = tmp_path / "snapshot" / "train.parquet"
    link.symlink_to(blob)
    (tmp_path / "data").symlink_to(tmp_path / "snapshot")
    for dataset in (link, link.parent, tmp_path / "data", tmp_path / "data" / "*.parquet"):
        assert find_files(str(dataset)) == [str(link)]
    assert plan_dataset(str(link)).rows == 2


def test_find_files_nothing_there(tmp_path: Path) -> None:
    for dataset in (tmp_path / "no.parquet", tmp_path / "*.parquet"):
        with pytest.raises(DataError, match="no such file or directory, and no file matches"):
            find_files(str(dataset))
    (tmp_path / "a.csv").touch()
    with pytest.raises(DataError, match=r"holds no data files\. Files ending in \.parquet"):
        find_files(str(tmp_path))


def test_find_files_by_a_file_url(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "a b.parquet", 3)
    assert find_files(path.as_uri()) == find_files(f"file://{tmp_path}") == [str(path)]


def test_find_files_saved_to_disk_in_its_own_order(tmp_path: Path) -> None:
    directory = _saved(tmp_path / "saved", [2, 1, 3])
    (directory / "cache-1234.arrow").write_bytes(b"left by a map()")
    names = [f"data-0000{i}-of-00003.arrow" for i in range(3)]
    assert _names(directory, directory) == names
    assert [file.rows for file in plan_dataset(str(directory)).files] == [2, 1, 3]


def test_find_files_several_splits_are_named(tmp_path: Path) -> None:
    for split in ("train", "test"):
        _saved(tmp_path / split, [2])
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"several splits \(train, test\).*such as '.*/train'"):
        find_files(str(tmp_path))
    assert plan_dataset(str(tmp_path / "test")).rows == 2


@pytest.mark.parametrize("note", ["{", "[]", "{}", '{"_data_files": [1]}', '{"_data_files": null}'])
def test_find_files_saved_to_disk_with_a_broken_note(tmp_path: Path, note: str) -> None:
    (_saved(tmp_path / "saved", [2]) / "state.json").write_text(note)
    with pytest.raises(DataError, match=r"state\.json is not what .* save_to_disk writes"):
        find_files(str(tmp_path / "saved"))
    (tmp_path / "dataset_dict.json").write_text(note)
    with pytest.raises(DataError, match=r"dataset_dict\.json is not what .* save_to_disk writes"):
        find_files(str(tmp_path))


def test_plan_saved_to_disk_with_a_file_gone(tmp_path: Path) -> None:
    directory = _saved(tmp_path / "saved", [2, 2])
    (directory / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00002\.arrow can't be read.*No such file"):
        plan_dataset(str(directory))


def test_plan_saved_to_disk_without_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no data files"):
        plan_dataset(str(_saved(tmp_path / "saved", [])))


def test_plan_reads_what_datasets_saves(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"prompt": ["p"] * 5, "chosen": list("abcde"), "rejected": list("fghij")}
    dataset = datasets.Dataset.from_dict(rows)
    dataset.save_to_disk(tmp_path / "one", num_shards=2)
    plan = plan_dataset(str(tmp_path / "one"), rows_per_shard=2)
    assert [file.rows for file in plan.files] == [3, 2]
    assert [shard.rows for shard in plan.shards] == [2, 2, 1]
    assert plan.row_format.kind is RowKind.PAIR
    datasets.DatasetDict({"a": dataset, "b": dataset}).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match=r"several splits \(a, b\)"):
        plan_dataset(str(tmp_path / "two"))


def test_plan_describes_the_files(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "a.parquet", 7)
    os.utime(path, ns=(1, 10**18 + 1))
    (file,) = plan_dataset(str(path)).files
    assert (file.path, file.format, file.rows) == (str(path), "parquet", 7)
    assert (file.size_bytes, file.mtime_ns) == (path.stat().st_size, 10**18 + 1)


def test_plan_drops_metadata_and_says_whether_there_are_conversations(tmp_path: Path) -> None:
    table = pa.table({"messages": [[{"role": "user", "content": "x"}]]})
    marked = table.schema.field(0).with_metadata({"a": "b"})
    path = _parquet(tmp_path / "a.parquet", table.cast(pa.schema([marked], {"pandas": "{}"})))
    plan = plan_dataset(str(path))
    assert plan.schema == table.schema
    assert plan.schema.metadata is plan.schema.field(0).metadata is None
    assert plan.conversational
    assert not plan_dataset(str(_parquet(path, 1))).conversational


@pytest.mark.parametrize("rows_per_shard", [1, 3, 4, 10, 100])
def test_plan_shards_cover_each_row_once_and_in_order(tmp_path: Path, rows_per_shard: int) -> None:
    for index, rows in enumerate((7, 1, 12)):
        _parquet(tmp_path / f"{index}.parquet", rows, row_group_size=4)
    plan = plan_dataset(str(tmp_path), rows_per_shard)
    assert [shard.index for shard in plan.shards] == list(range(len(plan.shards)))
    assert plan.rows == 20
    assert [shard.rows for shard in plan.shards[:-1]] == [rows_per_shard] * (len(plan.shards) - 1)
    assert 0 < plan.shards[-1].rows <= rows_per_shard
    covered = [place for shard in plan.shards for place in _places(shard)]
    expected = [(file.path, row // 4, row % 4) for file in plan.files for row in range(file.rows)]
    assert covered == expected


def _places(shard: Shard) -> list[tuple[str, int, int]]:
    """For each row of a shard its file, its row group and its number there."""
    return [
        (extent.file.path, extent.piece.at, extent.piece.skip + row)
        for extent in shard.extents
        for row in range(extent.rows)
    ]


def test_plan_shards_go_through_files_and_row_groups(tmp_path: Path) -> None:
    a = _parquet(tmp_path / "a.parquet", 7, row_group_size=4)
    b = _parquet(tmp_path / "b.parquet", 2)
    first, last = plan_dataset(str(tmp_path), 6).shards
    assert [(e.file.path, e.piece) for e in first.extents] == [
        (str(a), Piece(4, at=0)),
        (str(a), Piece(2, at=1)),
    ]
    assert [(e.file.path, e.piece) for e in last.extents] == [
        (str(a), Piece(1, at=1, skip=2)),
        (str(b), Piece(2, at=0)),
    ]
    assert (first.source, last.source) == (str(a), f"{a} to {b}")


def test_shard_slices_are_its_rows(tmp_path: Path) -> None:
    for index, rows in enumerate((3, 1, 5)):
        _parquet(tmp_path / f"{index}.parquet", rows, row_group_size=2)
    (_, shard) = plan_dataset(str(tmp_path), 2).shards[:2]
    (whole,) = plan_dataset(str(tmp_path), 9).shards
    for start in range(9):
        for rows in range(1, 10 - start):
            part = whole.slice(start, rows)
            assert (part.index, part.rows) == (0, rows)
            assert _places(part) == _places(whole)[start : start + rows]
            assert _places(part.slice(rows - 1, 1)) == _places(whole)[start + rows - 1 :][:1]
    assert whole.slice(0, 9) == whole
    assert _places(shard.slice(1, 1)) == _places(shard)[1:]


@pytest.mark.parametrize(
    ("total", "rows"), [(1, 1), (64, 64), (65, 64), (16_384, 64), (16_385, 65), (3_000_000, 4096)]
)
def test_plan_automatic_shards_are_neither_small_nor_large(
    tmp_path: Path, total: int, rows: int
) -> None:
    table = pa.table({"text": pa.repeat("", total)})
    path = _parquet(tmp_path / "a.parquet", table, row_group_size=total)
    shards = plan_dataset(str(path)).shards
    assert {shard.rows for shard in shards[:-1]} <= {rows}
    assert 0 < shards[-1].rows <= rows


def test_plan_is_the_same_when_made_again(tmp_path: Path) -> None:
    for name in ("b.parquet", "a/b.parquet", "a.parquet"):
        _parquet(tmp_path / name, 9, row_group_size=4)
    assert plan_dataset(str(tmp_path), 3) == plan_dataset(str(tmp_path), 3)


def test_plan_passes_over_files_without_rows(tmp_path: Path) -> None:
    _parquet(tmp_path / "a.parquet", pa.table({"other": pa.array([], pa.int8())}))
    _parquet(tmp_path / "b.parquet", 3)
    plan = plan_dataset(str(tmp_path))
    assert [file.rows for file in plan.files] == [0, 3]
    assert [shard.source for shard in plan.shards] == [str(tmp_path / "b.parquet")]
    assert plan.schema.names == ["text"]


def test_plan_without_any_row(tmp_path: Path) -> None:
    _parquet(tmp_path / "a.parquet", 0)
    _parquet(tmp_path / "b.parquet", 0)
    with pytest.raises(DataError, match="is empty: no rows in any of its 2 files"):
        plan_dataset(str(tmp_path))


def test_plan_with_columns_of_no_format(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "a.parquet", pa.table({"question": ["q"], "answer": ["a"]}))
    with pytest.raises(DataError, match=r"No known row format in the columns question, answer"):
        plan_dataset(str(path))


def test_plan_with_a_column_that_scoring_would_add(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "a.parquet", pa.table({"text": ["a"], "reward": [1.0]}))
    with pytest.raises(DataError, match="already has the columns reward"):
        plan_dataset(str(path))


def test_plan_with_a_column_that_parquet_can_not_hold(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "a.jsonl", {"text": "a", "meta": {}}, {"text": "b", "meta": {}})
    with pytest.raises(DataError, match=r"Column 'meta' is of type struct<>, which Parquet"):
        plan_dataset(str(path))
    _jsonl(path, {"text": "a", "meta": {}}, {"text": "b", "meta": {"k": 1}})
    assert plan_dataset(str(path)).rows == 2


@pytest.mark.parametrize("name", REFUSED)
def test_plan_with_a_column_of_a_type_that_parquet_has_not(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.arrow"
    table = pa.table({"text": list("abcd"), "other": REFUSED[name]})
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match=r"Column 'other' is of type .*, which Parquet can't hold"):
        plan_dataset(str(path))


def test_plan_with_an_unknown_extension(tmp_path: Path) -> None:
    for name in ("a.csv", "a"):
        (tmp_path / name).write_text("text\nx\n")
        with pytest.raises(DataError, match="does not end as any format does"):
            plan_dataset(str(tmp_path / name))
        with pytest.raises(DataError, match="does not end as any format does"):
            plan_dataset(str(tmp_path / f"{name}*"))


def test_plan_with_mixed_formats(tmp_path: Path) -> None:
    _parquet(tmp_path / "a.parquet", 1)
    _jsonl(tmp_path / "b.jsonl", {"text": "a"})
    with pytest.raises(
        DataError, match=r"mixes formats: .*a\.parquet is parquet, .*b\.jsonl is json"
    ):
        plan_dataset(str(tmp_path))


def test_plan_with_mixed_schemas_names_column_and_file(tmp_path: Path) -> None:
    _parquet(tmp_path / "a.parquet", pa.table({"text": pa.array([], pa.string())}))
    _parquet(tmp_path / "b.parquet", pa.table({"text": ["a"], "id": [1], "x": [1]}))
    _parquet(tmp_path / "c.parquet", pa.table({"text": ["a"], "id": ["1"]}))
    with pytest.raises(
        DataError,
        match=r"'id' is int64 in .*b\.parquet and string in .*c\.parquet \(so differ x\)",
    ):
        plan_dataset(str(tmp_path))
    _parquet(tmp_path / "c.parquet", pa.table({"text": ["a"], "id": [1]}))
    with pytest.raises(DataError, match=r"'x' is int64 in .* and absent in .*c\.parquet\."):
        plan_dataset(str(tmp_path))


def test_plan_takes_columns_in_another_order(tmp_path: Path) -> None:
    _parquet(tmp_path / "a.parquet", pa.table({"text": ["a"], "id": [1]}))
    _parquet(tmp_path / "b.parquet", pa.table({"id": [2], "text": ["b"]}))
    assert plan_dataset(str(tmp_path)).schema.names == ["text", "id"]


@pytest.mark.parametrize("wide", ["first", "last"])
def test_plan_unites_columns_that_differ_in_width_only(tmp_path: Path, wide: str) -> None:
    def table(text: pa.DataType, data: pa.DataType, list_of: Any) -> pa.Table:
        talk = list_of(pa.struct([("role", text), ("content", text)]))
        return pa.table(
            {
                "text": pa.array(["a", None], text),
                "data": pa.array([b"a", None], data),
                "talk": pa.array([[{"role": "user", "content": "x"}, None], []], talk),
            }
        )

    narrow = table(pa.string(), pa.binary(), pa.list_)
    others = [
        table(pa.large_string(), pa.large_binary(), pa.large_list),
        narrow.set_column(0, "text", narrow["text"].dictionary_encode()),
    ]
    for number, other in enumerate(others):
        first, last = (other, narrow) if wide == "first" else (narrow, other)
        folder = tmp_path / str(number)
        _parquet(folder / "a.parquet", first)
        _parquet(folder / "b.parquet", last)
        plan = plan_dataset(str(folder))
        text = pa.large_string()
        assert plan.schema.field("text").type == text
        if number == 0:
            turn = pa.struct([("role", text), ("content", text)])
            assert plan.schema.types[1:] == [pa.large_binary(), pa.large_list(turn)]
        rows, lost = read_shard(plan.shards[0], plan.schema)
        assert lost == {}
        assert rows.to_pylist() == narrow.to_pylist() * 2
    _parquet(tmp_path / "0" / "c.parquet", narrow.set_column(1, "data", narrow["text"]))
    with pytest.raises(DataError, match="'data' is large_binary in .* and string in"):
        plan_dataset(str(tmp_path / "0"))


def test_plan_keeps_what_makes_a_column_an_extension(tmp_path: Path) -> None:
    """Nobody here knows the type: whoever does finds it in the output."""
    marks = {"ARROW:extension:name": "some.one", "ARROW:extension:metadata": "{}"}
    field = pa.field("x", pa.int64(), metadata={**marks, "other": "dropped"})
    table = pa.table({"text": ["a"], "x": [1]}, schema=pa.schema([("text", pa.string()), field]))
    plan = plan_dataset(str(_parquet(tmp_path / "a.parquet", table)))
    rows, _ = read_shard(plan.shards[0], plan.schema)
    expected = {name.encode(): value.encode() for name, value in marks.items()}
    assert rows.schema.field("x").metadata == expected


def test_plan_unites_what_json_files_hold(tmp_path: Path) -> None:
    _jsonl(tmp_path / "a.jsonl", {"text": "a", "x": None, "tags": [], "n": 1})
    _jsonl(tmp_path / "b.jsonl", {"text": "b", "x": {"k": "2024-01-01"}, "n": 1.5, "late": True})
    _jsonl(tmp_path / "c.jsonl", {"text": "b", "x": None})
    expected = {
        "text": pa.string(),
        "x": pa.struct([("k", pa.string())]),
        "tags": pa.list_(pa.string()),
        "n": pa.float64(),
        "late": pa.bool_(),
    }
    schema = plan_dataset(str(tmp_path)).schema
    assert {field.name: field.type for field in schema} == expected
    _jsonl(tmp_path / "d.jsonl", {"text": 5})
    with pytest.raises(DataError, match=r"d\.jsonl does not fit the files before it: .*text"):
        plan_dataset(str(tmp_path))


def test_plan_with_a_prompt_that_is_always_null(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "a.jsonl", {"prompt": None, "chosen": "a", "rejected": "b"})
    with pytest.raises(DataError, match="Column 'prompt' is of type null"):
        plan_dataset(str(path))


def test_plan_with_columns_of_one_name(tmp_path: Path) -> None:
    twice = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    path = _parquet(tmp_path / "a.parquet", twice)
    with pytest.raises(DataError, match=r"a\.parquet has several columns or fields named 'text'"):
        plan_dataset(str(path))
    pair = pa.StructArray.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["role", "role"])
    _parquet(path, pa.table({"messages": pa.ListArray.from_arrays([0, 1], pair)}))
    with pytest.raises(DataError, match="several columns or fields named 'role'"):
        plan_dataset(str(path))
