"""The dispatcher against a scripted fleet: nothing lost, nothing twice."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import pytest
from fleets import FakeFleet, dispatcher, kill_once, run, tasks

from rayreward.errors import PoolError
from rayreward.events import Lost, Task


def test_run_gives_each_result_once() -> None:
    subject = dispatcher(FakeFleet())
    subject.start()
    assert sorted(run(subject, 50)) == list(range(50))


def test_run_can_be_called_again_and_with_no_tasks() -> None:
    subject = dispatcher(FakeFleet())
    subject.start()
    assert run(subject, 0) == []
    assert sorted(run(subject, 3)) == [0, 1, 2]
    assert sorted(run(subject, 3)) == [0, 1, 2]


def test_run_bounds_the_work_in_flight_and_takes_tasks_lazily() -> None:
    fleet = FakeFleet()
    subject = dispatcher(fleet, num_actors=3)
    subject.start()
    taken = 0

    def source() -> Any:
        nonlocal taken
        for task in tasks(100):
            taken += 1
            yield task

    results = subject.run(source())
    next(results)
    assert taken <= 3 * 2
    assert fleet.most_in_flight == 2
    assert len(list(results)) == 99


def test_run_spreads_work_over_the_actors_before_it_queues() -> None:
    fleet = FakeFleet()
    subject = dispatcher(fleet, num_actors=4)
    subject.start()
    run(subject, 4)
    assert sorted(actor for actor, _ in fleet.ran) == [0, 1, 2, 3]


def test_dead_actors_work_is_done_again() -> None:
    dead: list[int] = []

    def kill(actor: int, task: Task) -> bool:
        if task.key in (3, 11) and task.key not in dead:
            dead.append(task.key)
            return True
        return False

    fleet = FakeFleet(kill)
    subject = dispatcher(fleet)
    subject.start()
    assert sorted(run(subject, 30)) == list(range(30))
    assert len(fleet.started) == 2 + 2
    assert subject.actors == [0, 1]


@pytest.mark.parametrize("seed", range(20))
def test_random_deaths_lose_nothing_and_repeat_nothing(seed: int) -> None:
    dice = random.Random(seed)
    fleet = FakeFleet(lambda actor, task: dice.random() < 0.1)
    subject = dispatcher(fleet, num_actors=dice.randint(1, 8), max_attempts=100)
    subject.start()
    assert sorted(run(subject, 200)) == list(range(200))


def test_task_that_outlives_too_many_actors_ends_the_run() -> None:
    fleet = FakeFleet(lambda actor, task: task.key == 5)
    subject = dispatcher(fleet)
    subject.start()
    with pytest.raises(PoolError, match=r"Shard 5 was being scored when 3 actors died"):
        run(subject, 10)


def test_error_of_a_task_ends_the_run_and_leaves_the_pool_usable() -> None:
    fleet = FakeFleet()
    subject = dispatcher(fleet)
    subject.start()
    work = tasks(10)
    work[4] = Task(4, "Shard 4", "fail", ())
    with pytest.raises(ValueError, match="bad task"):
        list(subject.run(work))
    assert sorted(run(subject, 5)) == list(range(5))


def test_caller_that_stops_early_leaves_nothing_behind() -> None:
    subject = dispatcher(FakeFleet())
    subject.start()
    for result in subject.run(tasks(20)):
        if result.value == 3:
            break
    assert sorted(run(subject, 5)) == list(range(5))


def test_machines_that_go_count_against_nothing() -> None:
    """Far more often than a shard may kill, than actors may die in a row, or while loading."""
    left = {"work": 40, "load": 10}
    fleet = FakeFleet()
    subject = dispatcher(fleet, num_actors=1)
    subject.start()
    found = []
    for _ in range(left["work"]):
        fleet.start_with = {0: [Lost(0, "gone.", with_machine=True) for _ in range(4)]}
        fleet.happen(Lost(0, "gone.", with_machine=True))
        found += run(subject, 1)
    assert found == [0] * left["work"]


def test_what_an_actor_died_over_is_done_again_alone() -> None:
    """Of two tasks in flight either may be to blame: with others beside it, it stays unclear."""
    fleet = FakeFleet(lambda actor, task: task.key == 5)
    subject = dispatcher(fleet, num_actors=1)
    subject.start()
    blamed: list[tuple[int, int]] = []

    def remedy(task: Task, deaths: int, reason: str) -> list[Task]:
        blamed.append((task.key, deaths))
        return [task] if deaths < 3 else []

    found = [r.value for r in subject.run(tasks(12), remedy=remedy)]
    assert sorted(found) == [key for key in range(12) if key != 5]
    assert blamed == [(5, 1), (5, 2), (5, 3)]
    suspects = [keys for keys in fleet.together if 5 in keys]
    assert suspects[-1] == {5}


def test_remedy_may_put_other_tasks_in_place_of_one() -> None:
    fleet = FakeFleet(lambda actor, task: task.key == 5)
    subject = dispatcher(fleet)
    subject.start()
    found = [r.value for r in subject.run(tasks(9), remedy=lambda *_: [Task(50, "half", "work")])]
    assert sorted(found) == [0, 1, 2, 3, 4, 6, 7, 8, 50]


def test_actors_that_die_without_end_are_an_error_that_blames_no_shard() -> None:
    fleet = FakeFleet(lambda actor, task: True)
    subject = dispatcher(fleet, max_attempts=1_000)
    subject.start()
    with pytest.raises(PoolError, match="11 actors died and nothing was finished between"):
        run(subject, 30)


def test_source_may_have_more_after_it_had_none() -> None:
    fleet = FakeFleet()
    subject = dispatcher(fleet)
    subject.start()
    more = deque(tasks(2))

    class Source:
        def __iter__(self) -> Any:
            return self

        def __next__(self) -> Task:
            if not more:
                raise StopIteration
            return more.popleft()

    found = []
    for result in subject.run(Source()):
        found.append(result.value)
        if result.value == 1:
            more.append(Task(2, "added", "work"))
    assert found == [0, 1, 2]


def test_interrupt_ends_the_run() -> None:
    turns = 0

    def check() -> None:
        nonlocal turns
        turns += 1
        if turns > 3:
            raise KeyboardInterrupt

    subject = dispatcher(FakeFleet(), check_interrupt=check)
    subject.start()
    with pytest.raises(KeyboardInterrupt):
        run(subject, 1000)


def test_stop_ends_every_actor_and_may_be_repeated() -> None:
    fleet = FakeFleet()
    subject = dispatcher(fleet, num_actors=3)
    subject.start()
    subject.stop()
    subject.stop()
    assert fleet.stopped == [0, 1, 2]


def test_call_each_asks_every_actor() -> None:
    subject = dispatcher(FakeFleet(), num_actors=3)
    subject.start()
    assert subject.call_each("fingerprint") == {0: 0, 1: 1, 2: 2}


def test_call_each_asks_the_replacement_of_an_actor_that_died() -> None:
    fleet = FakeFleet(kill_once(1))
    subject = dispatcher(fleet, num_actors=3)
    subject.start()
    assert subject.call_each("fingerprint") == {0: 0, 1: 1, 2: 2}
    assert fleet.started == [0, 1, 2, 1]
