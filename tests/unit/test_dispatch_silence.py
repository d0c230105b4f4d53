"""The dispatcher by the clock: tasks that are slow, and actors that fall silent."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fleets import FakeFleet, dispatcher, run, tasks

from rayreward.events import Alive, Event, Lost, Task


def ticking(
    fleet: FakeFleet, seconds: float, meanwhile: Callable[[], None] = lambda: None
) -> Callable[[], float]:
    """A clock that goes on with every wait for the fleet."""
    now, wait = [0.0], fleet.wait

    def wait_a_while(timeout_s: float) -> list[Event]:
        now[0] += seconds
        meanwhile()
        return wait(timeout_s)

    fleet.wait = wait_a_while  # type: ignore[method-assign]
    return lambda: now[0]


@pytest.mark.parametrize("prove", [False, True])
def test_a_slow_task_is_tried_elsewhere_and_the_first_to_be_done_counts(prove: bool) -> None:
    fleet = FakeFleet()
    hung: list[int] = []

    def hangs(actor: int, task: Task) -> bool:
        if task.key == 7 and not hung:
            hung.append(actor)
        return task.key == 7 and actor in hung

    fleet.hangs = hangs
    clock = ticking(fleet, 1)
    subject = dispatcher(fleet, tasks_per_actor=1, clock=clock)
    subject.start()
    found = [r.value for r in subject.run(tasks(9), prove=prove) if r.proven is None]
    assert sorted(found) == list(range(9))
    assert [actor for actor, key in fleet.ran if key == 7] == [1 - hung[0]]
    assert clock() < 30
    assert fleet.started == [0, 1]  # who is slow is not replaced


@pytest.mark.parametrize("dies", ["first", "second"])
def test_a_slow_task_whose_actor_dies_is_done_once(dies: str) -> None:
    """While another actor tries a slow task, one of the two dies: the other goes on with it."""
    fleet = FakeFleet()
    holders: list[int] = []
    turns = 0

    def hangs(actor: int, task: Task) -> bool:
        nonlocal turns
        if task.key != 7:
            return False
        if actor not in holders:
            holders.append(actor)
        turns += len(holders) == 2
        if turns == 4:
            dead = holders[dies == "second"]
            fleet.never_ready = {dead}
            fleet.happen(Lost(dead, "killed."))
        return turns < 12

    fleet.hangs = hangs
    subject = dispatcher(fleet, tasks_per_actor=1, clock=ticking(fleet, 1))
    subject.start()
    found = [result.value for result in subject.run(tasks(9))]
    assert sorted(found) == list(range(9))


def test_a_silent_actor_is_replaced_and_its_work_done_elsewhere() -> None:
    fleet = FakeFleet()
    hung: list[int] = []

    def hangs(actor: int, task: Task) -> bool:
        if task.key == 4 and len(fleet.started) == 1:
            hung.append(actor)
            return True
        return False

    fleet.hangs = hangs
    # it answers, and does not get on
    clock = ticking(fleet, 2, lambda: fleet.happen(Alive(0, 1)))
    subject = dispatcher(fleet, num_actors=1, silent_after_s=30.0, clock=clock)
    subject.start()
    assert sorted(run(subject, 9)) == list(range(9))
    assert hung
    assert fleet.started == [0, 0]
    assert fleet.stopped == [0]


def test_an_actor_that_gets_on_is_never_silent() -> None:
    fleet = FakeFleet()
    turns = 0

    def hangs(actor: int, task: Task) -> bool:
        nonlocal turns
        turns += task.key == 4
        return task.key == 4 and turns < 100

    fleet.hangs = hangs
    clock = ticking(fleet, 2, lambda: fleet.happen(Alive(0, turns)))
    subject = dispatcher(fleet, num_actors=1, silent_after_s=30.0, clock=clock)
    subject.start()
    assert sorted(run(subject, 9)) == list(range(9))
    assert fleet.started == [0]
