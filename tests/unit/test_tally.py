"""tally: what became of the rows, counted from the columns that scoring added."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from rayreward.columns import reward_columns
from rayreward.preferences import RowKind
from rayreward.tally import tally_columns
from rayreward.types import Failure, Outcome, Reward, Status, Tally

TOO_LONG = Failure(Status.TOO_LONG, "too long", tokens=9)
EMPTY = Failure(Status.EMPTY, "empty")


def _tally(kind: RowKind, *rows: Sequence[Outcome]) -> Tally:
    return tally_columns(kind, reward_columns(kind, rows))


def _reward(value: float, tokens: int = 1, truncated: bool = False) -> Reward:
    return Reward(value, tokens, truncated)


def test_tally_of_single_texts() -> None:
    found = _tally(
        RowKind.SINGLE, [_reward(0.0, 3)], [_reward(1.0, 4, True)], [TOO_LONG], [EMPTY], [EMPTY]
    )
    assert found == Tally(
        rows=5, failed={"empty": 2, "too_long": 1}, rewards=2, tokens=16, truncated=1
    )
    assert found.failed_rows == 3


def test_tally_of_pairs_keeps_ties_apart() -> None:
    found = _tally(
        RowKind.PAIR,
        [_reward(2.0, 3), _reward(1.0, 4)],
        [_reward(1.0), _reward(1.5)],
        [_reward(-1.0), _reward(-1.0)],
        [_reward(0.0, truncated=True), _reward(0.0, truncated=True)],
    )
    assert found == Tally(
        rows=4, rewards=8, tokens=13, truncated=2, pairs=4, wins=1, ties=2, margin_sum=0.5
    )


def test_tally_leaves_half_pairs_out_of_the_margin() -> None:
    rows: list[list[Outcome]] = [
        [_reward(5.0), TOO_LONG],
        [EMPTY, _reward(-5.0)],
        [_reward(3.0), _reward(1.0)],
    ]
    found = _tally(RowKind.PAIR, *rows)
    assert (found.pairs, found.wins, found.margin_sum) == (1, 1, 2.0)
    assert (found.rewards, found.failed_rows) == (4, 2)


def test_tally_adds_up_margins_in_float64() -> None:
    found = _tally(RowKind.PAIR, [_reward(2.0**24), _reward(-1.0)])
    assert found.margin_sum == 2.0**24 + 1


def test_tally_of_completions_counts_each_of_them() -> None:
    found = _tally(
        RowKind.COMPLETIONS,
        [_reward(1.0, 3), _reward(2.0, 4, True)],
        [TOO_LONG, _reward(3.0, 5)],
        [],
    )
    assert found == Tally(rows=3, failed={"too_long": 1}, rewards=3, tokens=21, truncated=1)


@pytest.mark.parametrize("kind", RowKind)
def test_tally_counts_unreadable_rows_as_failed(kind: RowKind) -> None:
    lost = reward_columns(kind, [Failure(Status.UNREADABLE, "damaged")] * 4)
    found = tally_columns(kind, lost)
    assert found == Tally(rows=4, failed={"unreadable": 4})


@pytest.mark.parametrize("kind", RowKind)
def test_tally_of_no_rows_is_zero(kind: RowKind) -> None:
    assert _tally(kind) == Tally()


def test_tally_of_shards_adds_up_to_that_of_the_whole() -> None:
    rows: list[list[Outcome]] = [
        [_reward(2.0, 3), _reward(1.0, 4)],
        [EMPTY, _reward(1.0)],
        [_reward(0.5, truncated=True), _reward(0.5)],
        [TOO_LONG, EMPTY],
        [EMPTY, EMPTY],
    ]
    shards = [rows[:2], rows[2:3], rows[3:]]
    whole = _tally(RowKind.PAIR, *rows)
    assert sum((_tally(RowKind.PAIR, *shard) for shard in shards), Tally()) == whole
    assert whole.failed == {"empty": 2, "too_long": 1}


def test_tally_sum_keeps_every_count() -> None:
    ones = Tally(
        failed={"empty": 1},
        **{field.name: 1 for field in dataclasses.fields(Tally) if field.name != "failed"},
    )
    twice = ones + ones
    assert all(
        getattr(twice, field.name) == ({"empty": 2} if field.name == "failed" else 2)
        for field in dataclasses.fields(Tally)
    )
