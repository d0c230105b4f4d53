"""columns: rewards with an audit of each; a reward that is not there is null and has a reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pytest

from rayreward.columns import check_free, reward_columns, reward_schema
from rayreward.errors import DataError
from rayreward.preferences import RowKind
from rayreward.types import Failure, Outcome, Reward, Status

FAILURES = [status for status in Status if status is not Status.OK]
TOO_LONG = Failure(Status.TOO_LONG, "9 tokens are more than max_length=8", tokens=9)
EMPTY = Failure(Status.EMPTY, "the text is empty")


def _rows(kind: RowKind, *rows: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The added columns, row by row."""
    found: list[dict[str, Any]] = reward_columns(kind, rows).to_pylist()
    return found


def test_columns_of_a_single_text() -> None:
    assert _rows(RowKind.SINGLE, [Reward(0.5, 7, False)], [Reward(-2.0, 8, True)]) == [
        {
            "reward": 0.5,
            "reward_tokens": 7,
            "reward_truncated": False,
            "reward_status": "ok",
            "reward_detail": None,
        },
        {
            "reward": -2.0,
            "reward_tokens": 8,
            "reward_truncated": True,
            "reward_status": "ok",
            "reward_detail": None,
        },
    ]


def test_columns_of_a_pair_have_the_margin() -> None:
    (row,) = _rows(RowKind.PAIR, [Reward(1.5, 7, False), Reward(2.0, 8, True)])
    assert row == {
        "reward_chosen": 1.5,
        "reward_rejected": 2.0,
        "reward_margin": -0.5,
        "reward_tokens_chosen": 7,
        "reward_tokens_rejected": 8,
        "reward_truncated_chosen": False,
        "reward_truncated_rejected": True,
        "reward_status": "ok",
        "reward_detail": None,
    }


def test_columns_of_completions_are_lists() -> None:
    first = [Reward(1.0, 3, False), Reward(2.0, 4, True), Reward(3.0, 5, False)]
    rows = _rows(RowKind.COMPLETIONS, first, [Reward(4.0, 6, False)], [])
    assert [row["rewards"] for row in rows] == [[1.0, 2.0, 3.0], [4.0], []]
    assert [row["reward_tokens"] for row in rows] == [[3, 4, 5], [6], []]
    assert [row["reward_truncated"] for row in rows] == [[False, True, False], [False], []]


@pytest.mark.parametrize("status", FAILURES)
def test_columns_hold_null_and_a_reason_for_each_failure(status: Status) -> None:
    (row,) = _rows(RowKind.SINGLE, [Failure(status, "the reason")])
    assert row == {
        "reward": None,
        "reward_tokens": None,
        "reward_truncated": None,
        "reward_status": status.value,
        "reward_detail": "the reason",
    }


def test_columns_keep_the_tokens_of_a_text_that_is_too_long() -> None:
    (row,) = _rows(RowKind.SINGLE, [TOO_LONG])
    assert (row["reward"], row["reward_tokens"], row["reward_truncated"]) == (None, 9, None)
    assert row["reward_detail"] == "9 tokens are more than max_length=8"


@pytest.mark.parametrize("failed", ["chosen", "rejected"])
def test_columns_of_half_a_pair_have_no_margin(failed: str) -> None:
    other = "rejected" if failed == "chosen" else "chosen"
    outcomes: dict[str, Outcome] = {failed: EMPTY, other: Reward(3.0, 5, False)}
    (row,) = _rows(RowKind.PAIR, [outcomes["chosen"], outcomes["rejected"]])
    assert row[f"reward_{failed}"] is None
    assert row[f"reward_{other}"] == 3.0
    assert row["reward_margin"] is None
    assert row["reward_status"] == "empty"
    assert row["reward_detail"] == f"{failed}: the text is empty"


def test_columns_of_a_failed_pair_say_what_failed_first() -> None:
    (row,) = _rows(RowKind.PAIR, [TOO_LONG, EMPTY])
    assert (row["reward_chosen"], row["reward_rejected"], row["reward_margin"]) == (None,) * 3
    assert row["reward_status"] == "too_long"
    assert row["reward_detail"].startswith("chosen: ")


def test_columns_of_completions_keep_the_place_of_a_failed_one() -> None:
    outcomes: list[Outcome] = [Reward(1.0, 3, False), TOO_LONG, Reward(2.0, 4, False)]
    (row,) = _rows(RowKind.COMPLETIONS, outcomes)
    assert row["rewards"] == [1.0, None, 2.0]
    assert row["reward_tokens"] == [3, 9, 4]
    assert row["reward_truncated"] == [False, None, False]
    assert row["reward_status"] == "too_long"
    assert row["reward_detail"].startswith("completions[1]: ")


@pytest.mark.parametrize("kind", RowKind)
def test_columns_have_the_same_schema_whatever_they_hold(kind: RowKind) -> None:
    samples = 2 if kind is RowKind.PAIR else 1
    for rows in ([], [[EMPTY] * samples], [[Reward(1.0, 1, False)] * samples]):
        assert reward_columns(kind, rows).schema == reward_schema(kind)


@pytest.mark.parametrize("kind", RowKind)
def test_columns_of_unreadable_rows_are_null(kind: RowKind) -> None:
    lost = Failure(Status.UNREADABLE, "row group 2 is damaged")
    rows = reward_columns(kind, [lost] * 3).to_pylist()
    assert len(rows) == 3
    for row in rows:
        assert row.pop("reward_status") == "unreadable"
        assert "row group 2 is damaged" in row.pop("reward_detail")
        assert set(row.values()) == {None}


@pytest.mark.parametrize("kind", RowKind)
def test_columns_refuse_an_input_that_has_them(kind: RowKind) -> None:
    added = reward_schema(kind).names
    for name in added:
        with pytest.raises(DataError, match=f"the columns {name}, .* Rename or drop them first"):
            check_free(pa.schema([("text", pa.string()), (name, pa.string())]), kind)
    with pytest.raises(DataError, match=", ".join(sorted(added))):
        check_free(reward_schema(kind), kind)


def test_columns_leave_other_names_to_the_input() -> None:
    names = ("prompt", "score", "Reward", "reward_model", "reward")
    check_free(pa.schema([(name, pa.string()) for name in names]), RowKind.PAIR)
