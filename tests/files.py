"""Files that tests read and write: a dataset of pairs, and the bytes of an output's parts."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def parts(output: Path) -> dict[str, str]:
    """Each part's name and the hash of its bytes."""
    return {
        part.name: hashlib.sha256(part.read_bytes()).hexdigest()
        for part in sorted(output.glob("part-*.parquet"))
    }


def pairs(path: Path, rows: int = 200, row_group_size: int = 60) -> Path:
    """Writes a dataset of pairs."""
    table = pa.table(
        {
            "id": list(range(rows)),
            "chosen": [f"good {n} " * (n % 9 + 1) for n in range(rows)],
            "rejected": [f"bad {n} " * (n % 5 + 1) for n in range(rows)],
        }
    )
    pq.write_table(table, path, row_group_size=row_group_size)
    return path
