"""isolation: exactly the rows that kill are found, by a number of deaths that goes with log2."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayreward.errors import PoolError
from rayreward.events import Task
from rayreward.isolation import TRY, Isolation

ATTEMPTS = 3


def without(whole: Task, poison: Sequence[int]) -> Task:
    return Task(("without", *poison), whole.name, "score_shard", (*whole.args, tuple(poison)))


def isolate(
    rows: int, kills: Callable[[range, Sequence[int]], bool]
) -> tuple[list[int], int, list[Task]]:
    """Plays a shard's tasks until it is scored; returns the guilty rows, deaths and tasks."""
    isolation = Isolation(ATTEMPTS, lambda task: rows, without)
    deaths: Counter[object] = Counter()
    queue, played = deque([Task("shard", "Shard 0", "score_shard", ("shard",))]), []
    while True:
        task = queue.popleft()
        played.append(task)
        if task.method == TRY:
            covered, spared = range(task.args[-2], task.args[-1]), ()
        else:
            covered, spared = range(rows), task.args[1] if len(task.args) > 1 else ()
        if kills(covered, spared):
            deaths[task.key] += 1
            queue.extendleft(isolation.after_death(task, deaths[task.key], "killed."))
        elif task.method == TRY:
            queue.extend(isolation.after_success(task))
            assert isolation.after_success(task) == []  # told twice, it asks for nothing twice
        else:
            return list(spared), sum(deaths.values()), played


@given(
    st.integers(1, 300).flatmap(
        lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), max_size=4))
    )
)
def test_exactly_the_rows_that_kill_are_found(case: tuple[int, set[int]]) -> None:
    rows, poison = case
    found, deaths, _ = isolate(
        rows, lambda covered, spared: bool(poison & set(covered) - set(spared))
    )
    assert found == sorted(poison)
    levels = math.ceil(math.log2(rows)) + 1
    assert deaths <= ATTEMPTS + len(poison) * (levels + ATTEMPTS)


def test_rows_that_come_through_are_not_blamed_for_deaths_that_pass() -> None:
    """Two deaths of the shard, then none: nothing is halved."""
    left = [True, True]
    found, deaths, played = isolate(8, lambda covered, spared: bool(left and left.pop()))
    assert (found, deaths, len(played)) == ([], 2, 3)


def test_a_row_is_guilty_only_after_as_many_deaths_as_a_shard() -> None:
    """A row whose only fault is that actors died twice while it ran is let go."""
    times: Counter[int] = Counter()

    def kills(covered: range, spared: Sequence[int]) -> bool:
        if 5 not in covered or 5 in spared:
            return False
        if len(covered) == 1:
            times[5] += 1
            return times[5] < ATTEMPTS
        return times[5] == 0

    found, _, _ = isolate(8, kills)
    assert found == []


def test_a_shard_that_kills_only_as_a_whole_is_an_error() -> None:
    with pytest.raises(PoolError, match="none dies over a part of it alone"):
        isolate(8, lambda covered, spared: len(covered) == 8)


def test_tries_say_which_rows_they_are_about() -> None:
    _, _, played = isolate(4, lambda covered, spared: 2 in covered and 2 not in spared)
    names = {task.name for task in played if task.method == TRY}
    assert names == {f"Shard 0, rows {rows}" for rows in ("0 to 1", "2 to 3", "2 to 2", "3 to 3")}
    assert len({task.key for task in played}) == len({(task.method, *task.args) for task in played})
