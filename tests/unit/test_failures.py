"""failures: whose fault a death is, and what slow and silent mean. By a clock of our own."""

from __future__ import annotations

import math

import pytest

from rayreward.errors import PoolError
from rayreward.events import Task
from rayreward.failures import Deaths, Watch, retry


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def task(key: int) -> Task:
    return Task(key, f"Shard {key}", "work")


def test_retry_gives_up_after_so_many_deaths() -> None:
    remedy = retry(3)
    assert [remedy(task(7), deaths, "killed.") for deaths in (1, 2)] == [[task(7)]] * 2
    with pytest.raises(PoolError, match=r"Shard 7 was being scored when 3 actors died.*killed\."):
        remedy(task(7), 3, "killed.")


def test_a_death_over_several_tasks_makes_them_suspect_and_counts_against_none() -> None:
    deaths = Deaths(most_in_a_row=100)
    for _ in range(5):
        assert deaths.after([task(1), task(2)], "killed.", retry(1)) == [task(1), task(2)]
    assert deaths.is_suspect(task(1))
    assert deaths.is_suspect(task(2))
    assert not deaths.is_suspect(task(3))


def test_a_death_over_one_task_counts_against_it_and_the_remedy_decides() -> None:
    deaths = Deaths(most_in_a_row=100)
    seen: list[int] = []

    def remedy(of: Task, count: int, reason: str) -> list[Task]:
        seen.append(count)
        return [task(10), task(11)] if count == 3 else [of]

    assert deaths.after([task(1)], "killed.", remedy) == [task(1)]
    assert deaths.after([task(1)], "killed.", remedy) == [task(1)]
    assert deaths.after([task(1)], "killed.", remedy) == [task(10), task(11)]
    assert seen == [1, 2, 3]
    assert deaths.is_suspect(task(10))


def test_what_was_finished_is_suspect_no_more() -> None:
    deaths = Deaths(most_in_a_row=100)
    deaths.after([task(1), task(2)], "killed.", retry(3))
    deaths.finished(task(1))
    assert not deaths.is_suspect(task(1))
    assert deaths.is_suspect(task(2))
    deaths.clear()
    assert not deaths.is_suspect(task(2))


def test_deaths_without_end_are_not_the_tasks_fault() -> None:
    deaths = Deaths(most_in_a_row=4)
    for key in range(4):
        deaths.after([task(key)], "killed.", retry(3))
    deaths.finished(task(0))
    for _ in range(4):
        deaths.after([], "killed.", retry(3))
    with pytest.raises(PoolError, match="5 actors died and nothing was finished between: killed"):
        deaths.after([task(9)], "killed.", retry(3))


def test_slow_is_three_times_the_median_and_never_before_there_is_one() -> None:
    clock = Clock()
    watch = Watch(clock, math.inf)
    for ticket in range(3):
        watch.began(0, ticket)
        clock.now += 10
        assert watch.slow([ticket]) == []
        watch.ended(0, ticket, done=True)
    watch.began(0, "late")
    clock.now += 5
    watch.began(1, "later")
    clock.now += 25
    assert watch.slow(["later", "late"]) == []
    clock.now += 1
    assert watch.slow(["later", "late"]) == ["late"]
    clock.now += 100
    assert watch.slow(["later", "late"]) == ["late", "later"]


def test_forgotten_calls_say_nothing_about_how_long_calls_take() -> None:
    clock = Clock()
    watch = Watch(clock, math.inf)
    for ticket in range(9):
        watch.began(0, ticket)
        clock.now += 10
        watch.ended(0, ticket, done=False)
    watch.began(0, "call")
    clock.now += 1_000
    assert watch.slow(["call"]) == []


def test_tiny_calls_are_not_slow_for_taking_three_times_nothing() -> None:
    clock = Clock()
    watch = Watch(clock, math.inf)
    for ticket in range(5):
        watch.began(0, ticket)
        clock.now += 0.01
        watch.ended(0, ticket, done=True)
    watch.began(0, "call")
    clock.now += 0.9
    assert watch.slow(["call"]) == []


def test_silent_is_who_neither_finishes_nor_gets_on() -> None:
    clock = Clock()
    watch = Watch(clock, 60)
    for actor in range(4):
        watch.began(actor, f"call of {actor}")
        watch.sign(actor, 5)
    clock.now += 40
    watch.sign(0, 6)  # gets on
    watch.sign(1, 5)  # answers, and does not
    watch.ended(2, "call of 2", done=True)
    watch.began(2, "next call of 2")
    assert watch.silent([0, 1, 2, 3]) == []
    clock.now += 40
    assert watch.silent([0, 1, 2, 3]) == [1, 3]
    clock.now += 1
    assert watch.silent([0, 2]) == []
    watch.gone(1)
    watch.began(1, "call of another actor in its place")
    clock.now += 2
    assert watch.silent([1]) == []


def test_a_clock_that_is_set_has_no_part_in_it() -> None:
    """Durations come from a clock that only grows, whatever happens to the time of day."""
    from rayreward.dispatch import Dispatcher

    assert Dispatcher.__init__.__kwdefaults__["clock"].__name__ == "monotonic"
