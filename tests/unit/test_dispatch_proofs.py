"""The dispatcher and proofs: what counts for proven, what is void and done again."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from typing import Any

import pytest
from fleets import FakeFleet, FakeGate, dispatcher, kill_once, refuse, tasks

from rayreward.dispatch import Result
from rayreward.errors import DeterminismError
from rayreward.events import Done, Event, Task


def outcomes(results: Iterable[Result]) -> dict[int, list[bool | None]]:
    """For each task how its value came, and what became of it."""
    found: dict[int, list[bool | None]] = {}
    for result in results:
        found.setdefault(result.task.key, []).append(result.proven)
    return found


def test_results_are_proven_by_the_actors_next_proof() -> None:
    fleet = FakeFleet()
    fleet.prove_every = 3
    subject = dispatcher(fleet, num_actors=1)
    subject.start()
    found = outcomes(subject.run(tasks(7)))
    assert found == {key: [None, True] if key < 6 else [None] for key in range(7)}


class BusyFleet(FakeFleet):
    """An actor that looks while it works on something else, which is done after the look."""

    def wait(self, timeout_s: float) -> list[Event]:
        done = {
            (0, "score"): {"done_s": 2.0},
            (1, "score"): {"done_s": 1.0, "looked_s": 1.5, "proof": "early"},
            (-1, "prove"): {"done_s": 3.0, "looked_s": 3.0, "proof": "late"},
        }
        queue = self._queues[0]
        events = [Done(t, k.key, **done[k.key, k.method]) for t, k in queue]  # type: ignore[arg-type]
        queue.clear()
        self._events.extend(events)
        return super().wait(timeout_s)


def test_a_proof_proves_what_was_done_before_the_look_and_nothing_after_it() -> None:
    """Whatever the order in which the driver hears of it."""
    proofs: list[Any] = []
    gate = FakeGate(confirm=lambda _, proof: proofs.append(proof))
    subject = dispatcher(BusyFleet(), num_actors=1, gate=gate)
    subject.start()
    jobs = [Task(key, f"Task {key}", "score") for key in range(2)]
    found = [(r.task.key, r.proven) for r in subject.run(jobs, prove=True)]
    assert found == [(0, None), (1, None), (1, True), (0, True)]
    assert proofs == ["early", "late"]


def test_run_that_proves_ends_with_a_proof_of_every_result() -> None:
    fleet = FakeFleet()
    fleet.prove_every = 3
    subject = dispatcher(fleet, num_actors=2)
    subject.start()
    assert outcomes(subject.run(tasks(7), prove=True)) == {key: [None, True] for key in range(7)}
    assert outcomes(subject.run([], prove=True)) == {}


def test_bad_proof_voids_what_came_since_the_last_good_one_and_does_it_again() -> None:
    fleet = FakeFleet()
    fleet.prove_every = 3
    proofs: list[int] = []

    def confirm(actor: int, proof: Any) -> None:
        proofs.append(actor)
        if len(proofs) == 2:
            refuse()

    subject = dispatcher(fleet, num_actors=1, gate=FakeGate(confirm=confirm))
    subject.start()
    found = outcomes(subject.run(tasks(9), prove=True))
    good, void = [None, True], [None, False, None, True]
    assert found == {key: void if key in (3, 4, 5) else good for key in range(9)}
    assert fleet.started == [0, 0]
    assert subject.quarantined == ["another model"]


def test_bad_last_proof_voids_and_does_again() -> None:
    fleet = FakeFleet()
    bad = [True]
    subject = dispatcher(
        fleet, num_actors=1, gate=FakeGate(confirm=lambda *_: refuse() if bad.pop() else None)
    )
    subject.start()
    bad.insert(0, False)
    assert outcomes(subject.run(tasks(2), prove=True)) == {
        key: [None, False, None, True] for key in range(2)
    }


def test_proofs_that_stay_bad_end_the_run() -> None:
    fleet = FakeFleet()
    subject = dispatcher(fleet, num_actors=2, gate=FakeGate(confirm=refuse))
    subject.start()
    with pytest.raises(DeterminismError, match="replacing them does not help"):
        list(subject.run(tasks(9), prove=True))


def test_actors_that_go_bad_after_good_work_are_replaced_as_often_as_it_takes() -> None:
    """A bit that flips now and then, in the same place: no end to it, and none of the run."""
    fleet = FakeFleet()
    fleet.prove_every = 3
    verdicts = itertools.cycle([lambda *_: None, refuse])
    gate = FakeGate(confirm=lambda *proof: next(verdicts)(*proof))
    subject = dispatcher(fleet, num_actors=1, gate=gate)
    subject.start()
    found = outcomes(subject.run(tasks(40), prove=True))
    assert {story[-1] for story in found.values()} == {True}
    assert len(found) == 40
    assert len(subject.quarantined) > 3


def test_dead_actors_unproven_results_are_void_where_proof_is_insisted_on() -> None:
    fleet = FakeFleet(kill_once(0, over=4))
    subject = dispatcher(fleet, num_actors=1)
    subject.start()
    found = outcomes(subject.run(tasks(6), prove=True))
    assert found == {
        key: [None, False, None, True] if key < 4 else [None, True] for key in range(6)
    }


@pytest.mark.parametrize("seed", range(30))
def test_random_deaths_and_bad_proofs_prove_each_result_once(seed: int) -> None:
    dice = random.Random(seed)
    fleet = FakeFleet(lambda actor, task: dice.random() < 0.05)
    fleet.prove_every = dice.randint(1, 9)
    gate = FakeGate(confirm=lambda *_: refuse() if dice.random() < 0.1 else None)
    subject = dispatcher(fleet, num_actors=dice.randint(1, 8), max_attempts=1000, gate=gate)
    subject.start()
    found = outcomes(subject.run(tasks(200), prove=True))
    assert sorted(found) == list(range(200))
    for story in found.values():
        assert story == [None, False] * (len(story) // 2 - 1) + [None, True]
