"""Requests of many callers: in turn, bounded, together where that costs little waiting."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayreward.errors import PoolBusyError, PoolError
from rayreward.merging import Piece, Request, RequestQueue
from rayreward.types import Reward, Text


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def request(caller: str, *sizes: int) -> Request:
    return Request(caller, [[Text("", f"{caller} {n}")] * size for n, size in enumerate(sizes)])


def queue(clock: Clock | None = None, *, max_rows: int = 1_000, rows: int = 4) -> RequestQueue:
    return RequestQueue(
        max_rows=max_rows, rows_per_task=rows, max_wait_s=0.5, clock=clock or Clock()
    )


def answer(pieces: list[Piece]) -> None:
    for piece in pieces:
        piece.request.receive(piece, [Reward(1.0, 1, truncated=False)] * piece.rows)


def test_few_rows_wait_for_company_and_not_for_longer_than_they_may() -> None:
    clock = Clock()
    subject = queue(clock)
    assert subject.ready_in() is None
    subject.put(request("a", 1))
    assert subject.ready_in() == 0.5
    assert subject.take() == []
    clock.now_s += 0.25
    subject.put(request("b", 1))
    assert subject.ready_in() == 0.25
    clock.now_s += 0.25
    assert [piece.request.caller for piece in subject.take()] == ["a", "b"]
    assert subject.rows == 0
    assert subject.ready_in() is None


def test_enough_rows_do_not_wait() -> None:
    subject = queue()
    for caller in "abcd":
        subject.put(request(caller, 1))
    assert subject.ready_in() == 0.0
    assert len(subject.take()) == 4


def test_a_small_caller_does_not_wait_behind_a_large_one() -> None:
    subject = queue(rows=4)
    subject.put(request("large", *[1] * 100))
    subject.put(request("small", 1, 1))
    callers = [piece.request.caller for piece in subject.take()]
    assert Counter(callers) == {"large": 2, "small": 2}


def test_turns_go_by_rows_and_not_by_groups() -> None:
    subject = queue(rows=32)
    subject.put(request("groups", *[8] * 20))
    subject.put(request("texts", *[1] * 40))
    rows: Counter[str] = Counter()
    for _ in range(2):
        for piece in subject.take():
            rows[str(piece.request.caller)] += piece.rows
    assert abs(rows["groups"] - rows["texts"]) <= 8


def test_a_caller_that_comes_late_does_not_catch_up() -> None:
    subject = queue(rows=4)
    subject.put(request("early", *[1] * 100))
    for _ in range(10):
        subject.take()
    subject.put(request("late", *[1] * 100))
    callers = Counter(piece.request.caller for piece in subject.take())
    assert callers == {"early": 2, "late": 2}


def test_more_than_may_wait_is_refused_and_says_so() -> None:
    subject = queue(max_rows=10)
    subject.put(request("a", 8))
    with pytest.raises(PoolBusyError, match="8 texts waiting.*max_queued_rows=10: 3 more"):
        subject.put(request("b", 3))
    subject.put(request("b", 2))


def test_a_request_larger_than_the_queue_is_taken_while_nothing_waits() -> None:
    subject = queue(max_rows=10)
    subject.put(request("a", *[1] * 50))
    assert subject.rows == 50


def test_a_removed_request_is_answered_with_the_error_and_not_handed_out() -> None:
    answered: list[Request] = []
    gone = Request("a", [[Text("", "x")], [Text("", "y")]], answered.append)
    subject = queue(rows=1)
    subject.put(gone)
    subject.put(request("b", 1))
    first = subject.take()
    assert [piece.request for piece in first] == [gone]
    subject.remove(gone, PoolError("gone"))
    subject.remove(gone, PoolError("gone again"))
    assert [str(request.error) for request in answered] == ["gone"]
    assert subject.rows == 1
    assert [piece.request.caller for piece in subject.take()] == ["b"]
    answer(first)
    assert len(answered) == 1
    assert gone.outcomes == [[None], [None]]


def test_only_what_is_half_done_is_taken_before_a_pause() -> None:
    subject = queue(rows=2)
    half, whole = request("a", 1, 1, 1), request("b", 1)
    subject.put(half)
    assert len(subject.take()) == 2
    subject.put(whole)
    assert [piece.request for piece in subject.take(begun_only=True)] == [half]
    assert subject.take(begun_only=True) == []
    assert subject.rows == 1


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.lists(st.integers(0, 5), max_size=5)), max_size=20
    ),
    st.integers(1, 9),
)
def test_every_row_is_handed_out_once_and_answered_once(
    wanted: list[tuple[str, list[int]]], rows: int
) -> None:
    answered: Counter[int] = Counter()
    subject = RequestQueue(max_rows=10**6, rows_per_task=rows, max_wait_s=0.0)
    requests = []
    for caller, sizes in wanted:
        groups = [[Text("", "x")] * size for size in sizes]
        made = Request(caller, groups, lambda request: answered.update([id(request)]))
        requests.append(made)
        if made.rows:
            subject.put(made)
    while pieces := subject.take():
        halved = [half for piece in pieces for half in piece.halves()]
        answer([piece for piece in halved if piece.rows])
    assert subject.rows == 0
    for made in requests:
        assert made.done
        assert answered[id(made)] == bool(made.rows)
        assert None not in [outcome for group in made.outcomes for outcome in group]
