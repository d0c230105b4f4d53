"""Counts what became of the rows of a scored table.

Does not know where the rewards came from.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rayreward.preferences import RowKind
from rayreward.types import Status, Tally


def tally_columns(kind: RowKind, columns: pa.Table) -> Tally:
    """Counts rows, failures, tokens and wins in the columns that scoring added."""
    statuses = Counter(columns["reward_status"].to_pylist())
    failed = {status: n for status, n in sorted(statuses.items()) if status != Status.OK}
    rewards = [n for n in columns.column_names if n in _REWARDS]
    pairs = _count_pairs(columns) if kind is RowKind.PAIR else {}
    return Tally(
        rows=columns.num_rows,
        failed=failed,
        rewards=sum(_valid(columns[name]) for name in rewards),
        tokens=sum(_total(columns[n]) for n in _starting(columns, "reward_tokens")),
        truncated=sum(_total(columns[n]) for n in _starting(columns, "reward_truncated")),
        **pairs,
    )


_REWARDS = ("reward", "rewards", "reward_chosen", "reward_rejected")


def _starting(columns: pa.Table, prefix: str) -> list[str]:
    return [name for name in columns.column_names if name.startswith(prefix)]


def _flat(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.list_flatten(column) if pa.types.is_list(column.type) else column


def _valid(column: pa.ChunkedArray) -> int:
    flat = _flat(column)
    return int(len(flat) - flat.null_count)


def _total(column: pa.ChunkedArray) -> int:
    return int(pc.sum(_flat(column)).as_py() or 0)


def _count_pairs(columns: pa.Table) -> dict[str, Any]:
    both = [
        (chosen, rejected)
        for chosen, rejected in zip(
            columns["reward_chosen"].to_pylist(),
            columns["reward_rejected"].to_pylist(),
            strict=True,
        )
        if chosen is not None and rejected is not None
    ]
    return {
        "pairs": len(both),
        "wins": sum(chosen > rejected for chosen, rejected in both),
        "ties": sum(chosen == rejected for chosen, rejected in both),
        "margin_sum": sum(chosen - rejected for chosen, rejected in both),
    }
