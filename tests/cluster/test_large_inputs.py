"""Large inputs: many small files, row groups of any size, columns of any type, through the job."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from columns_of_all_types import CONVERTED, TEXT_TYPES, TEXTS, UNCHANGED
from files import parts

from rayreward import OutputError, RewardPool

pytestmark = pytest.mark.ray

ROWS = [{"id": n, "text": f"row {n} " * (n % 7 + 1)} for n in range(60)]
TABLE = pa.Table.from_pylist(ROWS)


def _small_files(folder: Path, kind: str) -> list[Path]:
    """`ROWS` in files of 1, 2, 3, … rows, an empty one among them, in the order of their names."""
    folder.mkdir()
    files, start = [], 0
    for number, rows in enumerate([1, 2, 0, *range(3, 11), 5]):
        path = folder / f"{number:03d}.{kind}"
        if kind == "parquet":
            pq.write_table(TABLE.slice(start, rows), path, write_page_checksum=True)
        else:
            lines = (json.dumps(row) + "\n" for row in ROWS[start : start + rows])
            path.write_text("".join(lines))
        files.append(path)
        start += rows
    assert start == len(ROWS)
    return files


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_g2_small_files_give_the_parts_that_one_large_file_gives(
    pool: RewardPool, tmp_path: Path, kind: str
) -> None:
    files = _small_files(tmp_path / "small", kind)
    pq.write_table(TABLE, tmp_path / "large.parquet")
    pool.score_dataset(str(tmp_path / "small"), str(tmp_path / "a"), rows_per_shard=16)
    pool.score_dataset(str(tmp_path / "large.parquet"), str(tmp_path / "b"), rows_per_shard=16)
    found = [pq.read_table(part) for part in sorted((tmp_path / "a").glob("part-*"))]
    assert len(files) > len(found) == 4
    assert [part.num_rows for part in found] == [16, 16, 16, 12]
    table = pa.concat_tables(found)
    assert table["id"].to_pylist() == list(range(60))
    assert table["reward"].null_count == 0
    assert parts(tmp_path / "a") == parts(tmp_path / "b")  # byte for byte


def test_damaged_small_file_spares_the_other_rows_of_its_shard(
    pool: RewardPool, tmp_path: Path
) -> None:
    files = _small_files(tmp_path / "small", "parquet")
    pool.score_dataset(str(tmp_path / "small"), str(tmp_path / "whole"), rows_per_shard=60)
    damaged = files[5]  # rows 10 to 14
    column = pq.read_metadata(damaged).row_group(0).column(1)
    content = bytearray(damaged.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start + column.total_compressed_size // 2] ^= 0xFF
    damaged.write_bytes(bytes(content))
    report = pool.score_dataset(str(tmp_path / "small"), str(tmp_path / "out"), rows_per_shard=60)
    assert dict(report.tally.failed) == {"unreadable": 5}
    whole, found = pq.read_table(tmp_path / "whole"), pq.read_table(tmp_path / "out")
    lost = range(10, 15)
    statuses = found["reward_status"].to_pylist()
    assert [row for row, status in enumerate(statuses) if status == "unreadable"] == list(lost)
    assert found["id"].to_pylist() == [None if n in lost else n for n in range(60)]
    kept = [row for row in range(60) if row not in lost]
    assert found.take(kept).equals(whole.take(kept))


def test_resume_refuses_a_small_file_that_has_changed(pool: RewardPool, tmp_path: Path) -> None:
    files = _small_files(tmp_path / "small", "jsonl")
    pool.score_dataset(str(tmp_path / "small"), str(tmp_path / "out"), rows_per_shard=16)
    before = parts(tmp_path / "out")
    files[7].write_text(files[7].read_text().replace("row", "new"))
    with pytest.raises(OutputError, match="its input files are others, or have changed"):
        pool.score_dataset(str(tmp_path / "small"), str(tmp_path / "out"), rows_per_shard=16)
    assert parts(tmp_path / "out") == before


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_columns_of_any_type_come_out_as_they_went_in(
    pool: RewardPool, tmp_path: Path, kind: str
) -> None:
    changed = {name: array for name, (array, _) in CONVERTED.items()}
    table = pa.table({"text": TEXTS, **UNCHANGED, **changed})
    source = tmp_path / f"x.{kind}"
    if kind == "parquet":
        table = table.drop("views within")  # Parquet's writer can't slice them
        pq.write_table(table, source, row_group_size=2)
    else:
        with pa.ipc.new_file(source, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    pool.score_dataset(str(source), str(tmp_path / "out"), max_failed_rows=4, rows_per_shard=3)
    found = pa.concat_tables(
        pq.read_table(part) for part in sorted((tmp_path / "out").glob("*.parquet"))
    )
    for name in table.column_names[1:]:
        array, kept = CONVERTED[name] if name in CONVERTED else (UNCHANGED[name], None)
        assert found.schema.field(name).type == (kept or array.type), name
        assert found[name].to_pylist() == (array.cast(kept) if kept else array).to_pylist(), name


def test_text_of_any_type_gets_the_same_rewards_and_files_may_differ_in_it(
    pool: RewardPool, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for number, kind in enumerate(TEXT_TYPES):
        table = pa.table({"text": pa.array(TEXTS).cast(kind)})
        pq.write_table(table, tmp_path / "in" / f"{number}.parquet")
    pool.score_dataset(str(tmp_path / "in"), str(tmp_path / "out"), max_failed_rows=5)
    found = pq.read_table(tmp_path / "out")
    assert found.schema.field("text").type == pa.large_string()
    assert found["text"].to_pylist() == TEXTS * len(TEXT_TYPES)
    rewards = found["reward"].to_pylist()
    assert rewards == rewards[: len(TEXTS)] * len(TEXT_TYPES)
    assert [reward is None for reward in rewards[: len(TEXTS)]] == [False, False, True, False]
