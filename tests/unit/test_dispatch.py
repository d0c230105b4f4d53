"""The dispatcher against a scripted fleet: nothing lost, nothing twice, only checked actors."""

from __future__ import annotations

import itertools
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from rayreward.dispatch import Dispatcher, Result
from rayreward.errors import DeterminismError, PlacementError, PoolError
from rayreward.events import Alive, Born, Done, Event, Failed, Lost, NotLoaded, NotPlaced, Task


class FakeFleet:
    """Actors that answer each task with its key, one task a turn, until told otherwise."""

    def __init__(self, kill: Callable[[int, Task], bool] = lambda actor, task: False) -> None:
        self.kill = kill
        self.start_with: dict[int, list[Event]] = {}
        self.started: list[int] = []
        self.stopped: list[int] = []
        self.ran: list[tuple[int, int]] = []
        self.most_in_flight = 0
        self.prove_every = 10**9
        self._since_proof: Counter[int] = Counter()
        self._events: deque[Event] = deque()
        self._beginnings: list[Event] = []
        self._queues: dict[int, deque[tuple[int, Task]]] = {}
        self._tickets = 0
        self.hangs: Callable[[int, Task], bool] = lambda actor, task: False
        self.together: list[set[int]] = []
        self.never_ready: set[int] = set()

    def happen(self, event: Event) -> None:
        """Something comes about that nobody asked for."""
        self._events.append(event)

    def start(self, actor: int) -> None:
        self.started.append(actor)
        scripted = self.start_with.get(actor)
        if actor not in self.never_ready:
            self._beginnings.append(scripted.pop(0) if scripted else Born(actor, f"birth {actor}"))
        self._queues[actor] = deque()

    def submit(self, actor: int, task: Task) -> int:
        self._tickets += 1
        self._queues[actor].append((self._tickets, task))
        self.most_in_flight = max(self.most_in_flight, len(self._queues[actor]))
        return self._tickets

    def wait(self, timeout_s: float) -> list[Event]:
        for actor, queue in self._queues.items():
            if queue:
                self._turn(actor, queue)
        events = [*self._events, *self._beginnings]
        self._events.clear()
        self._beginnings.clear()
        return events

    def forget(self, ticket: int) -> None:
        for queue in self._queues.values():
            for item in list(queue):
                if item[0] == ticket:
                    queue.remove(item)

    def stop(self, actor: int) -> None:
        self.stopped.append(actor)
        self._queues.pop(actor, None)

    def _turn(self, actor: int, queue: deque[tuple[int, Task]]) -> None:
        ticket, task = queue[0]
        self.together.append({task.key for _, task in queue})
        if self.hangs(actor, task):
            return
        if self.kill(actor, task):
            queue.clear()
            self._events.append(Lost(actor, "killed."))
            return
        queue.popleft()
        self.ran.append((actor, task.key))
        if task.method == "fail":
            self._events.append(Failed(ticket, ValueError("bad task")))
            return
        self._since_proof[actor] += 1
        due = task.method == "prove" or self._since_proof[actor] >= self.prove_every
        if due:
            self._since_proof[actor] = 0
        self._events.append(Done(ticket, task.key, "proof" if due else None))


class FakeGate:
    """Admits everybody and finds every proof good, until told otherwise."""

    def __init__(
        self,
        admit: Callable[[int, Any], bool] = lambda actor, birth: True,
        confirm: Callable[[int, Any], None] = lambda actor, proof: None,
    ) -> None:
        self.admit = admit
        self.confirm = confirm


def refuse(*_: Any) -> Any:
    raise DeterminismError("another model", None)  # type: ignore[arg-type]


def dispatcher(
    fleet: FakeFleet, num_actors: int = 2, gate: FakeGate | None = None, **settings: Any
) -> Dispatcher:
    defaults: dict[str, Any] = {
        "num_actors": num_actors,
        "tasks_per_actor": 2,
        "max_attempts": 3,
    }
    return Dispatcher(fleet, gate or FakeGate(), **{**defaults, **settings})


def kill_once(victim: int, over: int | None = None) -> Callable[[int, Task], bool]:
    """Kills one actor over its first task, or over that of a number."""
    died: list[int] = []

    def kill(actor: int, task: Task) -> bool:
        if actor == victim and not died and over in (None, task.key):
            died.append(actor)
            return True
        return False

    return kill


def tasks(count: int) -> list[Task]:
    return [Task(key, f"Shard {key}", "work", ()) for key in range(count)]


def run(subject: Dispatcher, count: int) -> list[int]:
    return [result.value for result in subject.run(tasks(count)) if result.proven is None]


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
