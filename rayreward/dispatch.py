"""Hands tasks to actors: a bounded number each, again elsewhere when an actor dies or goes bad.

The loop and its bookkeeping. What an actor is and how it is reached is the fleet's business
(`rayreward.fleet` for Ray, a fake in tests); who may work is the gate's (`rayreward.admission`);
where tasks come from is the caller's.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from rayreward.errors import DeterminismError, PlacementError, PoolError

_logger = logging.getLogger("rayreward")

_WAIT_S = 0.2
"""How long one wait lasts at most, so that signals are noticed."""

_PROVE = "prove"
"""The actor method whose result is a proof."""


@dataclass(frozen=True, slots=True)
class Task:
    """A call of one actor method. `key` is unique within a run, `name` is for messages."""

    key: int
    name: str
    method: str
    args: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Born:
    """An actor has its model loaded; `birth` is what it says of itself."""

    actor: int
    birth: Any


@dataclass(frozen=True, slots=True)
class NotPlaced:
    """The cluster found no room for an actor in time."""

    actor: int
    reason: str


@dataclass(frozen=True, slots=True)
class NotLoaded:
    """An actor could not load its model; another try would end the same."""

    actor: int
    error: BaseException


@dataclass(frozen=True, slots=True)
class Lost:
    """An actor died, with everything handed to it."""

    actor: int
    reason: str


@dataclass(frozen=True, slots=True)
class Done:
    """A task has its result.

    `proof`, where there is one, says what the actor held after that; else it has not looked. It
    proves what the same actor had done by `looked_s`, which may leave out what it did beside.

    Attributes:
        ticket: From `Fleet.submit`.
        value: What the method returned.
        proof: What the gate can confirm, or null.
        done_s: When the task was done, by the actor's clock.
        looked_s: When the actor looked, by the same clock.
    """

    ticket: Any
    value: Any
    proof: Any = None
    done_s: float = 0.0
    looked_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Failed:
    """A task raised an error of its own; the actor lives."""

    ticket: Any
    error: BaseException


Event = Born | NotPlaced | NotLoaded | Lost | Done | Failed


class Fleet(Protocol):
    """The border to the actors."""

    def start(self, actor: int) -> None:
        """Begins to bring up an actor; `Born`, `NotPlaced`, `NotLoaded` or `Lost` will follow."""

    def submit(self, actor: int, task: Task) -> Any:
        """Calls an actor's method; returns a ticket that `Done` or `Failed` will carry."""

    def wait(self, timeout_s: float) -> list[Event]:
        """What has happened, waiting at most so long for the first event."""

    def forget(self, ticket: Any) -> None:
        """Drops a ticket: no event will come for it, though the actor may go on with its work."""

    def stop(self, actor: int) -> None:
        """Ends an actor and forgets everything handed to it."""


class Gate(Protocol):
    """Decides who may work."""

    def admit(self, actor: int, birth: Any) -> bool:
        """Whether an actor that was just born may work; if not, it is not replaced.

        Raises:
            DeterminismError: It may not, and is to be replaced.
        """

    def confirm(self, actor: int, proof: Any) -> None:
        """Looks at a working actor's proof.

        Raises:
            DeterminismError: It is not what it was: what it did since its last proof is void.
        """


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
        check_interrupt: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            fleet: The actors.
            gate: Who of them may work.
            num_actors: How many to keep.
            tasks_per_actor: Tasks handed to an actor at once.
            max_attempts: Deaths over one task, over one actor's start, or actors not admitted in
                one place, until giving up.
            check_interrupt: Called often; may raise to end whatever is going on.
        """
        self.births: dict[int, Any] = {}
        self.quarantined: list[str] = []
        self._fleet = fleet
        self._gate = gate
        self._num_actors = num_actors
        self._tasks_per_actor = tasks_per_actor
        self._max_attempts = max_attempts
        self._check_interrupt = check_interrupt
        self._starting: set[int] = set()
        self._deaths_at_start: Counter[int] = Counter()
        self._refusals: Counter[int] = Counter()
        self._handed_out: dict[int, OrderedDict[Any, Task]] = {}
        self._holder: dict[Any, int] = {}
        self._unproven: dict[int, list[tuple[float, Result]]] = {}
        self._insist = False
        self._again: deque[Task] = deque()
        self._deaths: Counter[int] = Counter()
        self._events: deque[Event] = deque()

    @property
    def actors(self) -> list[int]:
        """Live actors that may work."""
        return sorted(self.births)

    def start(self) -> None:
        """Brings up the first actors.

        Raises:
            PlacementError: None found a place.
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

    def run(self, tasks: Iterable[Task], *, prove: bool = False) -> Iterator[Result]:
        """Runs tasks; yields their results in the order in which they come in (`Result`).

        Tasks are taken from the iterable only as actors can take them. If the caller stops
        early, or a task fails, what was handed out is forgotten.

        Args:
            tasks: What to do.
            prove: Whether to end only when every result is proven.

        Raises:
            PoolError: A task outlived `max_attempts` actors, or no actor is left.
            DeterminismError: An actor went bad, and so did those that took its place.
            Exception: The first error that a task itself raised.
        """
        source = iter(tasks)
        try:
            self._insist = prove
            while self._hand_out(source):
                for event in self._wait():
                    yield from self._attend(event)
        finally:
            self._abandon()

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
                        results[self._take_back(event.ticket)[1].key] = event.value
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
        self._fleet.stop(actor)
        self._events = deque(
            e for e in self._events if not (isinstance(e, Lost) and e.actor == actor)
        )
        void = self._take_out(actor)
        self.quarantined.append(str(error))
        self._refusals[actor] += 1
        if self._refusals[actor] >= self._max_attempts:
            raise DeterminismError(
                f"{error}\n{self._refusals[actor]} actors in this place have failed: replacing "
                "them does not help.",
                error.report,
            )
        _logger.warning("actor %d is taken out of work and replaced: %s", actor, error)
        self._start(actor)
        return void

    def stop(self) -> None:
        """Ends all actors. Safe to call again."""
        for actor in [*self.births, *self._starting]:
            self._fleet.stop(actor)
        self.births.clear()
        self._starting.clear()
        self._handed_out.clear()
        self._holder.clear()
        self._unproven.clear()
        self._again.clear()

    def _attend(self, event: Event) -> list[Result]:
        """Does what an event asks for; returns the results that it brings, proves or voids."""
        if isinstance(event, Done):
            return self._receive(event)
        if isinstance(event, Failed):
            self._take_back(event.ticket)
            raise event.error
        if isinstance(event, Lost):
            return self._bury(event)
        self._starting.discard(event.actor)
        if isinstance(event, Born):
            self._join(event.actor, event.birth)
            self._admit(event.actor, event.birth)
            return []
        self._fleet.stop(event.actor)
        if isinstance(event, NotLoaded):
            raise event.error
        self._go_on_without(event.actor, event.reason)
        return []

    def _wait(self) -> Iterator[Event]:
        """What has happened. Events that the caller leaves are there for the next one."""
        self._check_interrupt()
        if not self._events:
            self._events.extend(self._fleet.wait(_WAIT_S))
        while self._events:
            event = self._events.popleft()
            if isinstance(event, Done | Failed) and event.ticket not in self._holder:
                continue  # its actor was taken out of work a moment ago
            yield event

    def _start(self, actor: int) -> None:
        self._starting.add(actor)
        self._fleet.start(actor)

    def _await_births(self) -> None:
        while self._starting:
            for event in self._wait():
                self._attend(event)

    def _start_again(self, event: Lost) -> None:
        """An actor died while it was loading its model."""
        self._deaths_at_start[event.actor] += 1
        if self._deaths_at_start[event.actor] >= self._max_attempts:
            raise PoolError(
                f"Actor {event.actor} died {self._max_attempts} times while loading the model: "
                f"{event.reason} Look for an out-of-memory kill on its machine."
            )
        _logger.warning("actor %d died while loading; starting it again", event.actor)
        self._start(event.actor)

    def _join(self, actor: int, birth: Any) -> None:
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

    def _take_out(self, actor: int) -> list[Result]:
        """Strikes an actor off; what it was doing and what is not proven is to be done again."""
        del self.births[actor]
        void = [Result(r.task, r.value, proven=False) for _, r in self._unproven.pop(actor)]
        handed_out = self._handed_out.pop(actor)
        for ticket in handed_out:
            del self._holder[ticket]
        tasks = [*(result.task for result in void), *handed_out.values()]
        self._again.extendleft(task for task in reversed(tasks) if task.method != _PROVE)
        return void

    def _go_on_without(self, actor: int, reason: str) -> None:
        _logger.warning("going on without actor %d: %s", actor, reason)
        if not self.births and not self._starting:
            raise PlacementError(reason)

    def _hand_out(self, source: Iterator[Task]) -> bool:
        """Fills the actors up, the emptiest first; returns whether anything is left to wait for."""
        for filled in range(self._tasks_per_actor):
            for actor, handed_out in self._handed_out.items():
                if len(handed_out) == filled:
                    task = self._again.popleft() if self._again else next(source, None)
                    if task is None:
                        if self._insist:
                            self._ask_for_proof()
                        return any(self._handed_out.values())
                    self._hand(actor, task)
        return True

    def _ask_for_proof(self) -> None:
        """Nothing is left to do: who has unproven results and no more work proves them."""
        for actor, results in self._unproven.items():
            if results and not self._handed_out[actor]:
                self._hand(actor, Task(-1, f"Check of actor {actor}", _PROVE))

    def _hand(self, actor: int, task: Task) -> None:
        ticket = self._fleet.submit(actor, task)
        self._handed_out[actor][ticket] = task
        self._holder[ticket] = actor

    def _take_back(self, ticket: Any) -> tuple[int, Task]:
        actor = self._holder.pop(ticket)
        return actor, self._handed_out[actor].pop(ticket)

    def _receive(self, event: Done) -> list[Result]:
        """Takes a result; where a proof came with it, settles all that waited for one."""
        actor, task = self._take_back(event.ticket)
        results = [] if task.method == _PROVE else [Result(task, event.value)]
        waiting = self._unproven[actor] + [(event.done_s, result) for result in results]
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

    def _bury(self, event: Lost) -> list[Result]:
        """Replaces a dead actor."""
        if event.actor in self._starting:
            self._start_again(event)
            return []
        guilty = next(iter(self._handed_out[event.actor].values()), None)
        if not self._insist:  # a death is no sign that what came before it is wrong
            self._unproven[event.actor] = []
        void = self._take_out(event.actor)
        if guilty is not None:
            self._deaths[guilty.key] += 1
            if self._deaths[guilty.key] >= self._max_attempts:
                raise PoolError(
                    f"{guilty.name} was being scored when {self._deaths[guilty.key]} actors died, "
                    f"one after the other: {event.reason} Look for an out-of-memory kill; a "
                    "smaller max_batch_tokens needs less memory."
                )
        _logger.warning("actor %d died and is replaced: %s", event.actor, event.reason)
        self._start(event.actor)
        return void

    def _abandon(self) -> None:
        """Forgets what is handed out, so that late results never mix with the next run's."""
        for ticket, actor in self._holder.items():
            self._handed_out[actor].pop(ticket)
            self._fleet.forget(ticket)
        self._holder.clear()
        self._insist = False
        self._again.clear()
        self._deaths.clear()
        self._unproven = {actor: [] for actor in self.births}
        kept = [event for event in self._events if not isinstance(event, Done | Failed)]
        self._events = deque(kept)
