"""attempts: what an actor writes is there whole, or not at all."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayreward.attempts import output_schema, read_provenance, write_attempt
from rayreward.errors import OutputError
from rayreward.types import Attempt, Tally

TALLY = Tally(rows=3, failed={"empty": 1}, rewards=2, tokens=7, pairs=2, wins=1, margin_sum=0.1)
PROVENANCE = {"model": "m", "settings": {"seed": 42, "modèle": "ü"}, "hashes": [1, 2]}
TABLE = pa.table({"text": [f"row {i}" for i in range(3)], "reward": [0.5, None, -1.0]})


def test_attempt_tells_what_it_wrote(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    attempt = write_attempt(str(path), 5, TABLE, TALLY)
    data = path.read_bytes()
    assert attempt == Attempt(5, str(path), len(data), hashlib.sha256(data).hexdigest(), TALLY)
    assert pq.read_table(path).equals(TABLE)


def test_attempt_gives_the_same_bytes_again(tmp_path: Path) -> None:
    schema = output_schema(
        pa.schema([("text", pa.string())]), pa.schema([("reward", pa.float64())]), PROVENANCE
    )
    first, second = (
        write_attempt(str(tmp_path / name), 0, TABLE.cast(schema), TALLY) for name in "ab"
    )
    assert first.sha256 == second.sha256
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_attempt_guards_its_pages(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write_attempt(str(path), 0, TABLE, TALLY)
    data = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(0).column(1)
    data[(column.dictionary_page_offset or 0) + column.total_compressed_size - 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(OSError, match=r"(?i)crc checksum"):
        pq.ParquetFile(path, page_checksum_verification=True).read()


def test_attempt_on_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"x\.parquet failed: No space left on device\. Free"):
        write_attempt(str(path), 0, TABLE, TALLY)
    assert list(tmp_path.iterdir()) == []
    assert Path("/dev/full").exists()


def test_attempt_past_the_file_size_limit_leaves_nothing(tmp_path: Path) -> None:
    code = """
import resource, signal, sys
import pyarrow as pa
from rayreward.errors import OutputError
from rayreward.types import Tally
from rayreward.attempts import write_attempt

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
table = pa.table({"n": list(range(100_000))})
try:
    write_attempt(sys.argv[1], 0, table, Tally())
except OutputError as error:
    print(error)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "x.parquet")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "x.parquet failed: File too large. Free space" in done.stdout
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_attempt_without_a_directory(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="failed: No such file or directory"):
        write_attempt(str(tmp_path / "no" / "x.parquet"), 0, TABLE, TALLY)


def test_output_schema_keeps_columns_and_carries_provenance(tmp_path: Path) -> None:
    source = pa.schema(
        [pa.field("text", pa.string(), nullable=False), ("id", pa.int8())],
        metadata={"pandas": "{}", "huggingface": "{}"},
    )
    schema = output_schema(source, pa.schema([("reward", pa.float32())]), PROVENANCE)
    assert schema.names == ["text", "id", "reward"]
    assert schema.field("text").nullable  # rows that can't be read have nulls
    assert set(schema.metadata) == {b"rayreward"}
    path = tmp_path / "x.parquet"
    write_attempt(str(path), 0, schema.empty_table(), TALLY)
    assert read_provenance(str(path)) == PROVENANCE
