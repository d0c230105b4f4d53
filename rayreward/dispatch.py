"""Hands tasks to actors: a bounded number each, again elsewhere when an actor dies or goes bad.

The loop. Who is there is kept in `rayreward.roster`, who is at what in `rayreward.assignments`;
what an actor is and how it is reached is the fleet's business (`rayreward.fleet` for Ray, a fake in
tests); who may work is the gate's (`rayreward.admission`); what a death or a silence means is
`rayreward.failures`'; where tasks come from is the caller's.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rayreward.assignments import Assignments, Result, Unproven
from rayreward.errors import DeterminismError
from rayreward.events import (
    PROVE,
    Alive,
    Born,
    Done,
    Event,
    Failed,
    Fleet,
    Gate,
    Lost,
    NotLoaded,
    NotPlaced,
    Task,
)
from rayreward.failures import Deaths, Remedy, retry
from rayreward.roster import Roster

_logger = logging.getLogger("rayreward")

_WAIT_S = 0.2
"""How long one wait lasts at most, so that signals are noticed."""

_SERVING_WAIT_S = 0.004
"""The same where callers wait for an answer: a task that comes meanwhile waits so long."""

Fail = Callable[[Task, BaseException], None]
"""Takes a task and the error that it raised."""

_DEATHS_IN_A_ROW = 10
"""With nothing finished between them: more is more than a few bad rows. Three for each actor in a
large pool, where a machine may take many."""


class Dispatcher:
    """Keeps actors alive and busy."""

    def __init__(
        self,
        fleet: Fleet,
        gate: Gate,
        *,
        num_actors: int,
        tasks_per_actor: int,
        max_attempts: int,
        min_actors: int | None = None,
        silent_after_s: float = math.inf,
        check_interrupt: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            fleet: The actors.
            gate: Who of them may work.
            num_actors: How many to keep.
            tasks_per_actor: Tasks handed to an actor at once.
            max_attempts: Deaths over one task, over one actor's start, or bad actors in a row in
                one place, until giving up.
            min_actors: With how many work may begin, and without how many it may not go on. Null:
                it begins once it is known of each whether there is room for it now, and goes on
                while there is one.
            silent_after_s: How long a busy actor may give no sign of getting on.
            check_interrupt: Called often; may raise to end whatever is going on.
            clock: Seconds that only grow.
        """
        self._fleet = fleet
        self._gate = gate
        self._roster = Roster(
            fleet, num_actors=num_actors, min_actors=min_actors, max_attempts=max_attempts
        )
        self._assigned = Assignments(clock, silent_after_s)
        self._unproven = Unproven()
        self._tasks_per_actor = tasks_per_actor
        self._max_attempts = max_attempts
        self._check_interrupt = check_interrupt
        self._insist = False
        self._fail: Fail | None = None
        self._again: deque[Task] = deque()
        self._deaths = Deaths(max(_DEATHS_IN_A_ROW, 3 * num_actors))
        self._remedy: Remedy = retry(max_attempts)
        self._events: deque[Event] = deque()

    @property
    def births(self) -> dict[int, Any]:
        """What each live actor said of itself when it was loaded."""
        return self._roster.births

    @property
    def quarantined(self) -> list[str]:
        """Why actors were taken out of work."""
        return self._roster.quarantined

    @property
    def actors(self) -> list[int]:
        """Live actors that may work."""
        return sorted(self.births)

    @property
    def coming(self) -> list[int]:
        """Actors that find their place, or load their model, at the moment."""
        return self._roster.coming

    def start(self) -> None:
        """Brings up the first actors; others may join later, as machines come.

        Raises:
            PlacementError: Too few found a place.
            PoolError: One of them died again and again while loading.
        """
        self._roster.fill()
        self._await_births()

    def review(self) -> None:
        """Puts every live actor before the gate, and the replacements of those that fail.

        Raises:
            DeterminismError: An actor failed, and so did those that took its place.
            PoolError: No actor may work.
        """
        for actor, birth in list(self.births.items()):
            self._admit(actor, birth)
        self._await_births()

    def run(
        self, tasks: Iterable[Task], *, prove: bool = False, remedy: Remedy | None = None
    ) -> Iterator[Result]:
        """Runs tasks; yields their results in the order in which they come in (`Result`).

        Tasks are taken from the iterable only as actors can take them; an iterator that has no
        more may have some again while others are under way. A task that is slow is tried by an
        idle actor too, and the first to be done counts. If the caller stops early, or a task
        fails, what was handed out is forgotten.

        Args:
            tasks: What to do.
            prove: Whether to end only when every result is proven.
            remedy: What to do when an actor died over a task. Null: again, `max_attempts` times.

        Raises:
            PoolError: No remedy is left for a task, or actors die without end, or too few are left.
            DeterminismError: An actor went bad, and so did those that took its place.
            Exception: The first error that a task itself raised.
        """
        self._insist = prove
        yield from self._work(tasks, remedy or retry(self._max_attempts))

    def serve(self, tasks: Iterable[Task], *, remedy: Remedy, fail: Fail) -> Iterator[Result]:
        """Like `run`, for tasks of callers who know nothing of each other: one's is not another's.

        An error of a task ends that task alone. An actor that can't be brought up is done without
        while there are others (`revive` tries again). Nothing is kept to be proven later: callers
        have their answers long before.

        Args:
            tasks: What to do; looked at again every few milliseconds.
            remedy: As for `run`. It should not raise.
            fail: Told of a task that raised an error.

        Raises:
            PoolError: Actors die without end, or none is left.
            DeterminismError: The last actor went bad, and so did those that took its place.
        """
        self._fail, self._roster.lenient = fail, True
        try:
            yield from self._work(tasks, remedy)
        finally:
            self._fail, self._roster.lenient = None, False

    def look(self) -> None:
        """Attends to what has happened while there was nothing to do. Does not wait.

        Raises:
            PoolError: As `run` does.
            DeterminismError: As `run` does.
        """
        for event in self._wait(0.0):
            self._attend(event)

    def revive(self) -> None:
        """Tries again to bring up the actors that are being done without."""
        self._roster.forgive()
        self._roster.fill()

    def replace(self, actor: int) -> None:
        """Ends an actor that does nothing, or is not up yet, and brings up another in its place."""
        if actor in self.births:
            self._remove(actor)
        else:
            self._fleet.stop(actor)
            self._roster.leave(actor)
        self._roster.start(actor)

    def call_each(self, method: str, *args: Any) -> dict[int, Any]:
        """Calls a method on every actor, those included that replace a dead one.

        Returns:
            The results by actor.

        Raises:
            PoolError: No actor is left.
            Exception: The first error that a call itself raised.
        """
        results: dict[int, Any] = {}
        called: set[int] = set()
        try:
            while self._roster.loading or len(results) < len(self.births):
                for actor in sorted(self.births.keys() - called):
                    called.add(actor)
                    self._hand(actor, Task(actor, f"{method} of actor {actor}", method, args))
                for event in self._wait():
                    if isinstance(event, Done):
                        results[self._assigned.remove(event.ticket)[0]] = event.value
                        continue
                    if isinstance(event, Lost):
                        called.discard(event.actor)
                        results.pop(event.actor, None)
                    self._attend(event)
        finally:
            self._abandon()
        return results

    def quarantine(self, actor: int, error: DeterminismError) -> list[Result]:
        """Takes an actor out of work, ends it, and brings up another in its place.

        Returns:
            What it did since its last proof, as void.

        Raises:
            DeterminismError: As many in a row have failed in this place as may.
        """
        void = self._remove(actor)
        self._roster.not_admitted(actor, error)
        return void

    def stop(self) -> None:
        """Ends all actors. Safe to call again."""
        for actor in self.births:
            self._assigned.leave(actor)
            self._unproven.leave(actor)
        self._roster.stop()
        self._again.clear()

    def _attend(self, event: Event) -> list[Result]:
        """Does what an event asks for; returns the results that it brings, proves or voids."""
        match event:
            case Done():
                return self._receive(event)
            case Failed():
                _, task = self._assigned.remove(event.ticket)
                if self._fail is None:
                    raise event.error
                self._settle(task)
                self._fail(task, event.error)
            case Lost():
                return self._bury(event)
            case Alive():
                self._assigned.sign(event)
            case Born():
                self._join(event.actor, event.birth)
                self._admit(event.actor, event.birth)
            case NotLoaded():
                self._roster.not_loaded(event)
            case NotPlaced():
                self._roster.not_placed(event)
        return []

    def _work(self, tasks: Iterable[Task], remedy: Remedy) -> Iterator[Result]:
        source = iter(tasks)
        self._remedy = remedy
        try:
            while self._hand_out(source):
                for event in self._wait(_SERVING_WAIT_S if self._fail else _WAIT_S):
                    yield from self._attend(event)
        finally:
            self._abandon()

    def _wait(self, timeout_s: float = _WAIT_S) -> Iterator[Event]:
        """What has happened. Events that the caller leaves are there for the next one."""
        self._check_interrupt()
        if not self._events:
            self._events.extend(self._fleet.wait(timeout_s))
            self._events.extend(self._fallen_silent())
        while self._events:
            event = self._events.popleft()
            if isinstance(event, Done | Failed) and event.ticket not in self._assigned:
                continue  # its actor was taken out of work a moment ago
            yield event

    def _fallen_silent(self) -> Iterator[Lost]:
        """Ends actors that have not got on for too long, as if they had died."""
        for actor in self._assigned.silent():
            self._fleet.stop(actor)
            yield Lost(actor, "it gave no sign of getting on for too long (silent_after_s).")

    def _await_births(self) -> None:
        while not self._roster.enough:
            for event in self._wait():
                self._attend(event)

    def _join(self, actor: int, birth: Any) -> None:
        self._roster.join(actor, birth)
        self._assigned.join(actor)
        self._unproven.join(actor)

    def _admit(self, actor: int, birth: Any) -> None:
        """Keeps an actor, replaces it, or lets it go, as the gate says."""
        try:
            admitted = self._gate.admit(actor, birth)
        except DeterminismError as error:
            self.quarantine(actor, error)
            return
        if not admitted:
            self._fleet.stop(actor)
            self._take_out(actor)
            self._roster.go_on_without(actor, "it is not like the others.")

    def _remove(self, actor: int) -> list[Result]:
        """Ends an actor and strikes it off."""
        self._fleet.stop(actor)
        self._events = deque(
            e for e in self._events if not (isinstance(e, Lost) and e.actor == actor)
        )
        return self._take_out(actor)

    def _take_out(self, actor: int) -> list[Result]:
        """Strikes an actor off; what it was doing and what is not proven is to be done again."""
        self._roster.leave(actor)
        void = self._unproven.leave(actor)
        self._do_again([*(result.task for result in void), *self._assigned.leave(actor)])
        return void

    def _do_again(self, tasks: Iterable[Task]) -> None:
        """Puts tasks before all others, but for those that another actor is at."""
        held = self._assigned.keys()
        again = [task for task in tasks if not task.is_proof and task.key not in held]
        self._again.extendleft(reversed(again))

    def _hand_out(self, source: Iterator[Task]) -> bool:
        """Fills the actors up, the emptiest first; returns whether anything is left to wait for."""
        for filled in range(self._tasks_per_actor):
            for actor in self._assigned.actors_with(filled):
                if not self._is_busy_alone(actor):
                    task = self._next(source, idle=not filled)
                    if task is None:
                        return self._wind_up()
                    self._hand(actor, task)
        return bool(self.births or self.coming)

    def _is_busy_alone(self, actor: int) -> bool:
        return any(map(self._deaths.is_suspect, self._assigned.of(actor)))

    def _next(self, source: Iterator[Task], *, idle: bool) -> Task | None:
        """What an actor may do now; only one that does nothing else may do what is suspect."""
        for task in self._again:
            if idle or not self._deaths.is_suspect(task):
                self._again.remove(task)
                return task
        return next(source, None)

    def _wind_up(self) -> bool:
        """There is no more to hand out: who is idle helps with what is slow, or proves itself."""
        idle = self._assigned.actors_with(0)
        if idle and self._assigned:
            for actor, task in zip(idle, self._assigned.slow(), strict=False):
                _logger.warning("%s is slow: actor %d tries it too", task.name, actor)
                self._assigned.double(task)
                self._hand(actor, task)
        if self._insist:
            self._ask_for_proof()
        return bool(self._assigned)

    def _ask_for_proof(self) -> None:
        """Who has unproven results and no more work proves them."""
        for actor in self._unproven.actors():
            if not self._assigned.of(actor):
                self._hand(actor, Task(-1, f"Check of actor {actor}", PROVE))

    def _hand(self, actor: int, task: Task) -> None:
        self._assigned.add(actor, self._fleet.submit(actor, task), task)

    def _receive(self, event: Done) -> list[Result]:
        """Takes a result; where a proof came with it, settles all that waited for one."""
        actor, task = self._assigned.remove(event.ticket)
        results = [] if task.is_proof else [Result(task, event.value)]
        if results:
            self._settle(task)
        if self._fail is None:
            self._unproven.add(actor, event, results)
        if event.proof is None:
            return results
        try:
            self._gate.confirm(actor, event.proof)
        except DeterminismError as error:
            return [*results, *self.quarantine(actor, error)]
        self._roster.proven(actor)
        return [*results, *self._unproven.prove(actor, event.looked_s)]

    def _settle(self, task: Task) -> None:
        """A task is done; what another actor does of it is of no use any more."""
        self._deaths.finished(task)
        for ticket in self._assigned.take_doubles(task):
            self._fleet.forget(ticket)

    def _bury(self, event: Lost) -> list[Result]:
        """Replaces a dead actor."""
        if event.actor in self.coming:
            self._roster.died_loading(event)
            return []
        if event.actor not in self.births:  # it was taken out of work a moment ago
            return []
        if not self._insist:  # a death is no sign that what came before it is wrong
            self._unproven.join(event.actor)
        in_flight = [task for task in self._assigned.of(event.actor) if not task.is_proof]
        void = self._take_out(event.actor)
        if not event.with_machine:
            for task in in_flight:
                if task in self._again:
                    self._again.remove(task)
            self._do_again(self._deaths.after(in_flight, event.reason, self._remedy))
        _logger.warning("actor %d died and is replaced: %s", event.actor, event.reason)
        self._roster.start(event.actor)
        return void

    def _abandon(self) -> None:
        """Forgets what is handed out, so that late results never mix with the next run's."""
        for ticket in self._assigned.clear():
            self._fleet.forget(ticket)
        self._insist = False
        self._again.clear()
        self._deaths.clear()
        for actor in self.births:
            self._unproven.join(actor)
        kept = [event for event in self._events if not isinstance(event, Done | Failed)]
        self._events = deque(kept)
