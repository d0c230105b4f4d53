"""The dispatcher and its actors: who comes, who is admitted, who is replaced."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from fleets import FakeFleet, FakeGate, dispatcher, kill_once, refuse, run, tasks

from rayreward.errors import DeterminismError, PlacementError, PoolError
from rayreward.events import Born, Lost, NotLoaded, NotPlaced, Task


def test_replacement_is_checked_before_it_gets_work() -> None:
    admitted: list[tuple[int, Any, int]] = []

    def admit(actor: int, birth: Any) -> bool:
        admitted.append((actor, birth, len(fleet.ran)))
        return True

    died: list[int] = []

    def kill(actor: int, task: Task) -> bool:
        if task.key == 2 and not died:
            died.append(actor)
            return True
        return False

    fleet = FakeFleet(kill)
    subject = dispatcher(fleet, num_actors=1, gate=FakeGate(admit))
    subject.start()
    run(subject, 6)
    assert admitted == [(0, "birth 0", 0), (0, "birth 0", 2)]


def test_replacement_that_is_not_admitted_gets_no_work() -> None:
    fleet = FakeFleet(lambda actor, task: task.key == 1)
    gate = FakeGate()
    subject = dispatcher(fleet, num_actors=1, gate=gate)
    subject.start()
    gate.admit = refuse
    with pytest.raises(DeterminismError, match="another model\n3 actors in this place"):
        run(subject, 4)
    assert fleet.ran == [(0, 0)]
    assert fleet.stopped == [0, 0, 0]
    assert subject.actors == []


def test_review_replaces_an_actor_that_is_not_admitted() -> None:
    fleet, seen = FakeFleet(), Counter[int]()

    def admit(actor: int, birth: Any) -> bool:
        seen[actor] += 1
        return refuse() if actor == 1 and seen[1] == 1 else True

    gate = FakeGate()
    subject = dispatcher(fleet, num_actors=3, gate=gate)
    subject.start()
    gate.admit = admit
    subject.review()
    assert fleet.started == [0, 1, 2, 1]
    assert fleet.stopped == [1]
    assert subject.actors == [0, 1, 2]
    assert subject.quarantined == ["another model"]


def test_actor_that_is_not_wanted_is_let_go_and_not_replaced() -> None:
    fleet = FakeFleet()
    gate = FakeGate()
    subject = dispatcher(fleet, num_actors=3, gate=gate)
    subject.start()
    gate.admit = lambda actor, birth: actor != 1
    subject.review()
    assert (fleet.started, fleet.stopped) == ([0, 1, 2], [1])
    assert subject.actors == [0, 2]
    assert sorted(run(subject, 9)) == list(range(9))
    assert {actor for actor, _ in fleet.ran} == {0, 2}


def test_start_without_any_room_is_an_error() -> None:
    fleet = FakeFleet()
    fleet.start_with = {n: [NotPlaced(n, "no room")] for n in range(2)}
    with pytest.raises(PlacementError, match="no room"):
        dispatcher(fleet).start()


def test_start_goes_on_with_the_actors_that_found_room() -> None:
    fleet = FakeFleet()
    fleet.start_with = {1: [NotPlaced(1, "no room")]}
    subject = dispatcher(fleet)
    subject.start()
    assert subject.births == {0: "birth 0"}
    assert sorted(run(subject, 9)) == list(range(9))
    assert {actor for actor, _ in fleet.ran} == {0}


def test_an_actor_joins_when_there_is_room_for_it_after_all() -> None:
    fleet = FakeFleet()
    fleet.start_with = {1: [NotPlaced(1, "no room")]}
    subject = dispatcher(fleet)
    subject.start()
    found = []
    for result in subject.run(tasks(40)):
        found.append(result.value)
        if len(found) == 5:
            fleet.happen(Born(1, "birth 1"))
    assert sorted(found) == list(range(40))
    assert subject.births == {0: "birth 0", 1: "birth 1"}
    assert {actor for actor, _ in fleet.ran} == {0, 1}


def test_work_begins_with_the_fewest_actors_and_does_not_wait_for_the_others() -> None:
    fleet = FakeFleet()
    fleet.never_ready = {1, 2}
    subject = dispatcher(fleet, num_actors=3, min_actors=1)
    subject.start()
    assert subject.actors == [0]
    assert sorted(run(subject, 9)) == list(range(9))
    fleet.happen(Born(2, "birth 2"))
    assert sorted(run(subject, 9)) == list(range(9))
    assert subject.actors == [0, 2]


def test_too_few_actors_are_an_error() -> None:
    fleet = FakeFleet()
    fleet.start_with = {1: [NotPlaced(1, "no room")]}
    with pytest.raises(PlacementError, match="no room"):
        dispatcher(fleet, min_actors=2).start()


def test_stop_ends_actors_that_wait_for_room_too() -> None:
    fleet = FakeFleet()
    fleet.start_with = {1: [NotPlaced(1, "no room")]}
    subject = dispatcher(fleet)
    subject.start()
    subject.stop()
    assert sorted(fleet.stopped) == [0, 1]


def test_start_tries_again_when_an_actor_dies_while_loading() -> None:
    fleet = FakeFleet()
    fleet.start_with = {0: [Lost(0, "killed."), Lost(0, "killed.")]}
    subject = dispatcher(fleet)
    subject.start()
    assert subject.actors == [0, 1]


def test_start_gives_up_on_an_actor_that_keeps_dying() -> None:
    fleet = FakeFleet()
    fleet.start_with = {0: [Lost(0, "killed.")] * 3}
    with pytest.raises(PoolError, match="Actor 0 died 3 times while loading"):
        dispatcher(fleet).start()


def test_last_actor_without_a_replacement_is_an_error_not_a_hang() -> None:
    fleet = FakeFleet(lambda actor, task: task.key == 1)
    subject = dispatcher(fleet, num_actors=1)
    subject.start()
    fleet.start_with = {0: [NotPlaced(0, "no room")]}
    with pytest.raises(PlacementError, match="no room"):
        run(subject, 3)


def test_start_with_a_model_that_cannot_be_loaded_is_its_error() -> None:
    fleet = FakeFleet()
    fleet.start_with = {1: [NotLoaded(1, ValueError("no head"))]}
    with pytest.raises(ValueError, match="no head"):
        dispatcher(fleet).start()


def test_replacement_that_cannot_load_ends_the_run_and_is_not_waited_for() -> None:
    fleet = FakeFleet(lambda actor, task: actor == 1 and task.key < 4)
    subject = dispatcher(fleet)
    subject.start()
    fleet.start_with = {1: [NotLoaded(1, ValueError("file is gone"))]}
    with pytest.raises(ValueError, match="file is gone"):
        run(subject, 30)
    assert subject.call_each("fingerprint") == {0: 0}


def test_caller_that_stops_early_misses_no_birth() -> None:
    """The replacement is born in the same moment as a result at which the caller leaves."""
    fleet = FakeFleet(kill_once(1))
    subject = dispatcher(fleet)
    subject.start()
    for _ in subject.run(tasks(20)):
        if len(fleet.started) == 3:  # the replacement's birth stands behind this result
            break
    assert subject.call_each("fingerprint") == {0: 0, 1: 1}
