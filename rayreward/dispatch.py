"""Hands tasks to actors: a bounded number each, again elsewhere when an actor dies or goes bad.

The loop and its bookkeeping. What an actor is and how it is reached is the fleet's business
(`rayreward.fleet` for Ray, a fake in tests); who may work is the gate's (`rayreward.admission`);
what a death or a silence means is `rayreward.failures`'; where tasks come from is the caller's.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from rayreward.errors import DeterminismError, PlacementError, PoolError
from rayreward.events import (
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
from rayreward.failures import Deaths, Remedy, Watch, retry

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

_PROVE = "prove"
"""The actor method whose result is a proof."""


@dataclass(frozen=True, slots=True)
class Result:
    """What `run` yields: a task with its value, or that the value is now proven, or void.

    Each value is yielded when it comes in, `proven` being null, and again later: proven, because
    its actor was found sound after it; or void, because its actor was found bad, or died before
    the proof that the run insists on. A task whose value is void is done again.
    """

    task: Task
    value: Any
    proven: bool | None = None


class Dispatcher:
    """Keeps actors alive and busy.

    Attributes:
        births: What each live actor said of itself when it was loaded.
        quarantined: Why actors were taken out of work.
    """

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
            max_attempts: Deaths over one task, over one actor's start, or actors not admitted in
                one place, until giving up.
            min_actors: With how many work may begin, and without how many it may not go on. Null:
                it begins once it is known of each whether there is room for it now, and goes on
                while there is one.
            silent_after_s: How long a busy actor may give no sign of getting on.
            check_interrupt: Called often; may raise to end whatever is going on.
            clock: Seconds that only grow.
        """
        self.births: dict[int, Any] = {}
        self.quarantined: list[str] = []
        self._fleet = fleet
        self._gate = gate
        self._num_actors = num_actors
        self._tasks_per_actor = tasks_per_actor
        self._max_attempts = max_attempts
        self._enough = min_actors or num_actors
        self._fewest = min_actors or 1
        self._check_interrupt = check_interrupt
        self._starting: set[int] = set()
        self._waiting: set[int] = set()
        self._deaths_at_start: Counter[int] = Counter()
        self._refusals: Counter[int] = Counter()
        self._handed_out: dict[int, OrderedDict[Any, Task]] = {}
        self._holder: dict[Any, int] = {}
        self._unproven: dict[int, list[tuple[float, Result]]] = {}
        self._insist = False
        self._fail: Fail | None = None
        self._again: deque[Task] = deque()
        self._doubled: set[Hashable] = set()
        self._deaths = Deaths(max(_DEATHS_IN_A_ROW, 3 * num_actors))
        self._remedy: Remedy = retry(max_attempts)
        self._watch = Watch(clock, silent_after_s)
        self._events: deque[Event] = deque()

    @property
    def actors(self) -> list[int]:
        """Live actors that may work."""
        return sorted(self.births)

    @property
    def coming(self) -> list[int]:
        """Actors that find their place, or load their model, at the moment."""
        return sorted(self._starting | self._waiting)

    def start(self) -> None:
        """Brings up the first actors; others may join later, as machines come.

        Raises:
            PlacementError: Too few found a place.
            PoolError: One of them died again and again while loading.
        """
        for actor in range(self._num_actors):
            self._start(actor)
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
        self._fail = fail
        try:
            yield from self._work(tasks, remedy)
        finally:
            self._fail = None

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
        self._deaths_at_start.clear()
        self._refusals.clear()
        for actor in range(self._num_actors):
            if actor not in self.births.keys() | self._starting | self._waiting:
                self._start(actor)

    def replace(self, actor: int) -> None:
        """Ends an actor that does nothing, or is not up yet, and brings up another in its place."""
        if actor in self.births:
            self._remove(actor)
        else:
            self._fleet.stop(actor)
            self._waiting.discard(actor)
        self._start(actor)

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
            while self._starting or len(results) < len(self.births):
                for actor in sorted(self.births.keys() - called):
                    called.add(actor)
                    self._hand(actor, Task(actor, f"{method} of actor {actor}", method, args))
                for event in self._wait():
                    if isinstance(event, Done):
                        results[self._take_back(event.ticket)[0]] = event.value
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
            DeterminismError: As many have failed in this place as may.
        """
        void = self._remove(actor)
        self.quarantined.append(str(error))
        self._refusals[actor] += 1
        if self._refusals[actor] >= self._max_attempts:
            last = DeterminismError(
                f"{error}\n{self._refusals[actor]} actors in this place have failed: replacing "
                "them does not help.",
                error.report,
            )
            self._give_up(actor, last)
            return void
        _logger.warning("actor %d is taken out of work and replaced: %s", actor, error)
        self._start(actor)
        return void

    def stop(self) -> None:
        """Ends all actors. Safe to call again."""
        for actor in [*self.births, *self._starting, *self._waiting]:
            self._fleet.stop(actor)
        self.births.clear()
        self._starting.clear()
        self._waiting.clear()
        self._handed_out.clear()
        self._holder.clear()
        self._unproven.clear()
        self._again.clear()

    def _attend(self, event: Event) -> list[Result]:
        """Does what an event asks for; returns the results that it brings, proves or voids."""
        match event:
            case Done():
                return self._receive(event)
            case Failed():
                _, task = self._take_back(event.ticket)
                if self._fail is None:
                    raise event.error
                self._settle(task)
                self._fail(task, event.error)
            case Lost():
                return self._bury(event)
            case Alive():
                self._watch.sign(event.actor, event.count)
            case Born():
                self._join(event.actor, event.birth)
                self._admit(event.actor, event.birth)
            case NotLoaded():
                self._starting.discard(event.actor)
                self._fleet.stop(event.actor)
                self._give_up(event.actor, event.error)
            case NotPlaced():
                self._starting.discard(event.actor)
                self._waiting.add(event.actor)
                self._go_on_without(event.actor, event.reason)
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
            if isinstance(event, Done | Failed) and event.ticket not in self._holder:
                continue  # its actor was taken out of work a moment ago
            yield event

    def _fallen_silent(self) -> Iterator[Lost]:
        """Ends actors that have not got on for too long, as if they had died."""
        busy = [actor for actor, handed_out in self._handed_out.items() if handed_out]
        for actor in self._watch.silent(busy):
            self._fleet.stop(actor)
            yield Lost(actor, "it gave no sign of getting on for too long (silent_after_s).")

    def _start(self, actor: int) -> None:
        self._starting.add(actor)
        self._fleet.start(actor)

    def _await_births(self) -> None:
        while self._starting and len(self.births) < self._enough:
            for event in self._wait():
                self._attend(event)

    def _start_again(self, event: Lost) -> None:
        """An actor died while it was loading its model."""
        self._deaths_at_start[event.actor] += not event.with_machine
        if self._deaths_at_start[event.actor] >= self._max_attempts:
            last = PoolError(
                f"Actor {event.actor} died {self._max_attempts} times while loading the model: "
                f"{event.reason} Look for an out-of-memory kill on its machine."
            )
            self._starting.discard(event.actor)
            self._give_up(event.actor, last)
            return
        _logger.warning("actor %d died while loading; starting it again", event.actor)
        self._start(event.actor)

    def _join(self, actor: int, birth: Any) -> None:
        self._starting.discard(actor)
        self._waiting.discard(actor)
        self.births[actor] = birth
        self._deaths_at_start.pop(actor, None)
        self._handed_out[actor] = OrderedDict()
        self._unproven[actor] = []

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
            self._go_on_without(actor, "it is not like the others.")

    def _give_up(self, actor: int, error: BaseException) -> None:
        """No actor can be brought up in this place."""
        if self._fail is None or not self.births:
            raise error
        _logger.warning("going on without actor %d: %s", actor, error)

    def _remove(self, actor: int) -> list[Result]:
        """Ends an actor and strikes it off."""
        self._fleet.stop(actor)
        self._events = deque(
            e for e in self._events if not (isinstance(e, Lost) and e.actor == actor)
        )
        return self._take_out(actor)

    def _take_out(self, actor: int) -> list[Result]:
        """Strikes an actor off; what it was doing and what is not proven is to be done again."""
        del self.births[actor]
        void = [Result(r.task, r.value, proven=False) for _, r in self._unproven.pop(actor)]
        handed_out = self._handed_out.pop(actor)
        for ticket in handed_out:
            del self._holder[ticket]
            self._watch.ended(actor, ticket, done=False)
        self._watch.gone(actor)
        self._do_again([*(result.task for result in void), *handed_out.values()])
        return void

    def _do_again(self, tasks: Iterable[Task]) -> None:
        """Puts tasks before all others, but for those that another actor is at."""
        held = {task.key for tasks in self._handed_out.values() for task in tasks.values()}
        again = [task for task in tasks if task.method != _PROVE and task.key not in held]
        self._again.extendleft(reversed(again))

    def _go_on_without(self, actor: int, reason: str) -> None:
        _logger.warning("going on without actor %d: %s", actor, reason)
        if len(self.births) + len(self._starting) < self._fewest:
            raise PlacementError(reason)

    def _hand_out(self, source: Iterator[Task]) -> bool:
        """Fills the actors up, the emptiest first; returns whether anything is left to wait for."""
        for filled in range(self._tasks_per_actor):
            for actor, handed_out in self._handed_out.items():
                if len(handed_out) == filled and not self._is_busy_alone(actor):
                    task = self._next(source, idle=not filled)
                    if task is None:
                        return self._wind_up()
                    self._hand(actor, task)
        return bool(self.births or self._starting or self._waiting)

    def _is_busy_alone(self, actor: int) -> bool:
        return any(map(self._deaths.is_suspect, self._handed_out[actor].values()))

    def _next(self, source: Iterator[Task], *, idle: bool) -> Task | None:
        """What an actor may do now; only one that does nothing else may do what is suspect."""
        for task in self._again:
            if idle or not self._deaths.is_suspect(task):
                self._again.remove(task)
                return task
        return next(source, None)

    def _wind_up(self) -> bool:
        """There is no more to hand out: who is idle helps with what is slow, or proves itself."""
        idle = [actor for actor, handed_out in self._handed_out.items() if not handed_out]
        if idle and len(idle) < len(self._handed_out):
            for actor, task in zip(idle, self._slow(), strict=False):
                _logger.warning("%s is slow: actor %d tries it too", task.name, actor)
                self._doubled.add(task.key)
                self._hand(actor, task)
        if self._insist:
            self._ask_for_proof()
        return any(self._handed_out.values())

    def _slow(self) -> list[Task]:
        """Tasks that take too long and that only one actor has."""
        slow = (
            self._handed_out[self._holder[ticket]][ticket]
            for ticket in self._watch.slow(self._holder)
        )
        return [t for t in slow if t.key not in self._doubled and t.method != _PROVE]

    def _ask_for_proof(self) -> None:
        """Who has unproven results and no more work proves them."""
        for actor, results in self._unproven.items():
            if results and not self._handed_out[actor]:
                self._hand(actor, Task(-1, f"Check of actor {actor}", _PROVE))

    def _hand(self, actor: int, task: Task) -> None:
        ticket = self._fleet.submit(actor, task)
        self._handed_out[actor][ticket] = task
        self._holder[ticket] = actor
        self._watch.began(actor, ticket)

    def _take_back(self, ticket: Any, *, done: bool = True) -> tuple[int, Task]:
        actor = self._holder.pop(ticket)
        self._watch.ended(actor, ticket, done=done)
        return actor, self._handed_out[actor].pop(ticket)

    def _receive(self, event: Done) -> list[Result]:
        """Takes a result; where a proof came with it, settles all that waited for one."""
        actor, task = self._take_back(event.ticket)
        results = [] if task.method == _PROVE else [Result(task, event.value)]
        if results:
            self._settle(task)
        kept = results if self._fail is None else []
        waiting = self._unproven[actor] + [(event.done_s, result) for result in kept]
        self._unproven[actor] = waiting
        if event.proof is None:
            return results
        try:
            self._gate.confirm(actor, event.proof)
        except DeterminismError as error:
            return [*results, *self.quarantine(actor, error)]
        self._unproven[actor] = [(at, r) for at, r in waiting if at > event.looked_s]
        proven = (r for at, r in waiting if at <= event.looked_s)
        return [*results, *(Result(r.task, r.value, proven=True) for r in proven)]

    def _settle(self, task: Task) -> None:
        """A task is done; what another actor does of it is of no use any more."""
        self._deaths.finished(task)
        if task.key in self._doubled:
            self._doubled.discard(task.key)
            for ticket, actor in list(self._holder.items()):
                if self._handed_out[actor][ticket].key == task.key:
                    self._take_back(ticket, done=False)
                    self._fleet.forget(ticket)

    def _bury(self, event: Lost) -> list[Result]:
        """Replaces a dead actor."""
        if event.actor in self._starting | self._waiting:
            self._waiting.discard(event.actor)
            self._start_again(event)
            return []
        if event.actor not in self.births:  # it was taken out of work a moment ago
            return []
        if not self._insist:  # a death is no sign that what came before it is wrong
            self._unproven[event.actor] = []
        in_flight = [t for t in self._handed_out[event.actor].values() if t.method != _PROVE]
        void = self._take_out(event.actor)
        if not event.with_machine:
            for task in in_flight:
                if task in self._again:
                    self._again.remove(task)
            self._do_again(self._deaths.after(in_flight, event.reason, self._remedy))
        _logger.warning("actor %d died and is replaced: %s", event.actor, event.reason)
        self._start(event.actor)
        return void

    def _abandon(self) -> None:
        """Forgets what is handed out, so that late results never mix with the next run's."""
        for ticket in list(self._holder):
            self._take_back(ticket, done=False)
            self._fleet.forget(ticket)
        self._insist = False
        self._doubled.clear()
        self._again.clear()
        self._deaths.clear()
        self._unproven = {actor: [] for actor in self.births}
        kept = [event for event in self._events if not isinstance(event, Done | Failed)]
        self._events = deque(kept)
