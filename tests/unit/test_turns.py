"""One at a time, on the thread that asks or always on the same one."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from rayreward.turns import OneThread, Turns


@pytest.mark.parametrize("kind", [Turns, OneThread])
def test_one_function_at_a_time_and_those_that_it_asks_for_at_once(kind: type[Turns]) -> None:
    turns, inside, most = kind(), [], []

    def work(number: int) -> int:
        inside.append(number)
        most.append(len(inside))
        turns.take(lambda: most.append(len(inside)))
        inside.remove(number)
        return number

    with ThreadPoolExecutor(8) as callers:
        done = callers.map(lambda number: turns.take(lambda: work(number)), range(200))
        assert list(done) == list(range(200))
    assert set(most) == {1}


def test_functions_run_on_the_thread_that_asks() -> None:
    with ThreadPoolExecutor(1) as caller:
        there = caller.submit(threading.get_ident).result()
        assert caller.submit(Turns().take, threading.get_ident).result() == there


def test_functions_run_on_one_thread_which_ends_with_its_owner() -> None:
    turns = OneThread()
    thread = turns.take(threading.current_thread)
    with ThreadPoolExecutor(4) as callers:
        threads = callers.map(turns.take, [threading.current_thread] * 20)
        assert set(threads) == {thread}
    assert thread is not threading.current_thread()
    del turns
    thread.join(10)
    assert not thread.is_alive()


def test_an_error_comes_to_who_asked() -> None:
    turns = OneThread()
    with pytest.raises(ZeroDivisionError):
        turns.take(lambda: 1 / 0)
    assert turns.take(lambda: 2) == 2
