"""The columns that scoring adds to a table: rewards, and an audit of each.

    row kind      rewards                                      audit
    single        reward                                       reward_tokens, reward_truncated
    pair          reward_chosen, reward_rejected,              reward_tokens_chosen, …_rejected,
                  reward_margin                                reward_truncated_chosen, …_rejected
    completions   rewards (a list)                             reward_tokens, reward_truncated
                                                               (lists)
    all                                                        reward_status, reward_detail

A reward that could not be computed is null; `reward_status` and `reward_detail` say why. Knows
Arrow; does not know how a reward comes about.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from rayreward.errors import DataError
from rayreward.preferences import RowKind
from rayreward.types import Failure, Outcome, Reward, Status

_SIDES = ("chosen", "rejected")

_FIELDS: dict[RowKind, list[tuple[str, pa.DataType]]] = {
    RowKind.SINGLE: [
        ("reward", pa.float32()),
        ("reward_tokens", pa.int32()),
        ("reward_truncated", pa.bool_()),
    ],
    RowKind.PAIR: [
        ("reward_chosen", pa.float32()),
        ("reward_rejected", pa.float32()),
        ("reward_margin", pa.float32()),
        *((f"reward_tokens_{side}", pa.int32()) for side in _SIDES),
        *((f"reward_truncated_{side}", pa.bool_()) for side in _SIDES),
    ],
    RowKind.COMPLETIONS: [
        ("rewards", pa.list_(pa.float32())),
        ("reward_tokens", pa.list_(pa.int32())),
        ("reward_truncated", pa.list_(pa.bool_())),
    ],
}


def reward_schema(kind: RowKind) -> pa.Schema:
    """The columns that rows of this kind get."""
    audit = [("reward_status", pa.string()), ("reward_detail", pa.string())]
    return pa.schema([*_FIELDS[kind], *audit])


def check_free(schema: pa.Schema, kind: RowKind) -> None:
    """Refuses an input whose own columns would be overwritten.

    Raises:
        DataError: A column of the input is named like one that scoring adds.
    """
    taken = sorted(set(schema.names) & set(reward_schema(kind).names))
    if taken:
        raise DataError(
            f"The input already has the columns {', '.join(taken)}, which scoring would add. "
            "Rename or drop them first."
        )


RowOutcome = Sequence[Outcome] | Failure
"""The outcomes of a row's samples, or one failure for the whole row."""


def reward_columns(kind: RowKind, rows: Sequence[RowOutcome]) -> pa.Table:
    """Builds the added columns.

    Args:
        kind: How many rewards a row has.
        rows: For each row the outcomes of its samples, in the order of its reward columns.
    """
    audit = (_value, _tokens, _truncated)
    if kind is RowKind.PAIR:
        values = _pair_values([(row, row) if isinstance(row, Failure) else row for row in rows])
    elif kind is RowKind.COMPLETIONS:
        values = [
            [None if isinstance(row, Failure) else [of(o) for o in row] for row in rows]
            for of in audit
        ]
    else:
        first = [row if isinstance(row, Failure) else row[0] for row in rows]
        values = [[of(outcome) for outcome in first] for of in audit]
    status = [_row_status(kind, row) for row in rows]
    values += [[code.value for code, _ in status], [detail for _, detail in status]]
    schema = reward_schema(kind)
    arrays = [pa.array(column, field.type) for column, field in zip(values, schema, strict=True)]
    return pa.table(arrays, schema=schema)


def _pair_values(rows: Sequence[Sequence[Outcome]]) -> list[list[Any]]:
    sides = [[row[side] for row in rows] for side in range(2)]
    rewards = [[_value(outcome) for outcome in side] for side in sides]
    margins = [
        None if chosen is None or rejected is None else chosen - rejected
        for chosen, rejected in zip(*rewards, strict=True)
    ]
    tokens = [[_tokens(outcome) for outcome in side] for side in sides]
    truncated = [[_truncated(outcome) for outcome in side] for side in sides]
    return [*rewards, margins, *tokens, *truncated]


def _row_status(kind: RowKind, row: RowOutcome) -> tuple[Status, str | None]:
    """The row's status is that of its first sample without a reward."""
    if isinstance(row, Failure):
        return row.status, row.detail
    for index, outcome in enumerate(row):
        if isinstance(outcome, Failure):
            where = {
                RowKind.PAIR: _SIDES[index % 2],
                RowKind.COMPLETIONS: f"completions[{index}]",
                RowKind.SINGLE: "",
            }[kind]
            told = not where or outcome.detail.startswith(where)
            return outcome.status, outcome.detail if told else f"{where}: {outcome.detail}"
    return Status.OK, None


def _value(outcome: Outcome) -> float | None:
    return outcome.value if isinstance(outcome, Reward) else None


def _tokens(outcome: Outcome) -> int | None:
    return outcome.tokens


def _truncated(outcome: Outcome) -> bool | None:
    return outcome.truncated if isinstance(outcome, Reward) else None
