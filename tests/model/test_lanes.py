"""Lanes: results in order, so many at once and no more, torch's threads shared out among them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from queue import SimpleQueue

import pytest
import torch

from rayreward.lanes import Lanes, share_threads

PATIENCE_S = 60.0


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield 4
    torch.set_num_threads(before)


def test_lanes_run_two_at_a_time_and_keep_the_order(threads: int) -> None:
    """Each call waits for another one: alone, none would end, and three would break the barrier."""
    pair, inside, most = threading.Barrier(2), SimpleQueue[int](), []

    def call(item: int) -> int:
        inside.put(item)
        most.append(inside.qsize())
        pair.wait(PATIENCE_S)
        inside.get()
        return item * item

    assert Lanes(2, threads).map(call, range(20)) == [item * item for item in range(20)]
    assert max(most) == 2


def test_one_lane_runs_one_after_the_other_on_all_threads(threads: int) -> None:
    lanes = Lanes(1, threads)
    assert lanes.map(lambda _: torch.get_num_threads(), range(4)) == [4, 4, 4, 4]


def test_threads_are_shared_out_anew_when_a_call_ends(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lanes, both, ended = Lanes(2, threads), threading.Barrier(2), threading.Event()
    count = lanes._count

    def counting(change: int) -> None:
        count(change)
        if change < 0:
            ended.set()

    monkeypatch.setattr(lanes, "_count", counting)

    def call(stays: bool) -> list[int]:
        both.wait(PATIENCE_S)
        share_threads()
        shares = [torch.get_num_threads()]
        both.wait(PATIENCE_S)
        if stays:
            assert ended.wait(PATIENCE_S)
            share_threads()
            shares.append(torch.get_num_threads())
        return shares

    assert lanes.map(call, [False, True]) == [[2], [2, 4]]


def test_threads_of_other_callers_are_left_alone(threads: int) -> None:
    Lanes(2, 2).map(lambda _: None, range(4))
    share_threads()
    assert torch.get_num_threads() == threads


def test_error_leaves_out_what_has_not_begun_and_waits_for_what_has(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, left_out, begun, done = threading.Barrier(2), threading.Event(), [], []

    def waiting(calls: list[Future[None]]) -> None:
        left_out.set()
        wait(calls)

    monkeypatch.setattr("rayreward.lanes.wait", waiting)

    def call(item: int) -> None:
        begun.append(item)
        if item < 2:
            both.wait(PATIENCE_S)
        if item == 0:
            raise LookupError("no such text")
        assert left_out.wait(PATIENCE_S)
        done.append(item)

    with pytest.raises(LookupError, match="no such text"):
        Lanes(2, threads).map(call, range(200))
    assert sorted(begun) == sorted([0, *done])
    assert set(begun) <= {0, 1, 2}
