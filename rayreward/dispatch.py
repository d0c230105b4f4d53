"""Hands tasks to actors: a bounded number each, again elsewhere when an actor dies.

The loop and its bookkeeping. What an actor is and how it is reached is the fleet's business
(`rayreward.fleet` for Ray, a fake in tests); where tasks come from is the caller's.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from rayreward.errors import PlacementError, PoolError

_logger = logging.getLogger("rayreward")

_WAIT_S = 0.2
"""How long one wait lasts at most, so that signals are noticed."""


@dataclass(frozen=True, slots=True)
class Task:
    """A call of one actor method. `key` is unique within a run, `name` is for messages."""

    key: int
    name: str
    method: str
    args: tuple[Any, ...]


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
    """A task has its result."""

    ticket: Any
    value: Any


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


class Dispatcher:
    """Keeps actors alive and busy.

    Attributes:
        births: What each live, checked actor said of itself when it was loaded.
    """

    def __init__(
        self,
        fleet: Fleet,
        *,
        num_actors: int,
        tasks_per_actor: int,
        max_attempts: int,
        admit: Callable[[int, Any], None],
        check_interrupt: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            fleet: The actors.
            num_actors: How many to keep.
            tasks_per_actor: Tasks handed to an actor at once.
            max_attempts: Deaths over one task, or over one actor's start, until giving up.
            admit: Called with a replacement's number and birth before it gets work; raises if it
                may not have any.
            check_interrupt: Called often; may raise to end whatever is going on.
        """
        self.births: dict[int, Any] = {}
        self._fleet = fleet
        self._num_actors = num_actors
        self._tasks_per_actor = tasks_per_actor
        self._max_attempts = max_attempts
        self._admit = admit
        self._check_interrupt = check_interrupt
        self._starting: set[int] = set()
        self._deaths_at_start: Counter[int] = Counter()
        self._handed_out: dict[int, OrderedDict[Any, Task]] = {}
        self._holder: dict[Any, int] = {}
        self._events: deque[Event] = deque()

    @property
    def actors(self) -> list[int]:
        """Live, checked actors."""
        return sorted(self.births)

    def start(self) -> dict[int, Any]:
        """Brings up the first actors and returns what they said of themselves, unchecked.

        Raises:
            PlacementError: None found a place.
            PoolError: One of them died again and again while loading.
        """
        for actor in range(self._num_actors):
            self._start(actor)
        reasons = []
        while self._starting:
            for event in self._wait():
                if isinstance(event, Born):
                    self._starting.discard(event.actor)
                    self._join(event.actor, event.birth)
                elif isinstance(event, NotPlaced):
                    reasons.append(self._give_up_place(event))
                elif isinstance(event, Lost):
                    self._start_again(event)
                elif isinstance(event, NotLoaded):
                    raise event.error
        if not self.births:
            raise PlacementError(reasons[0])
        return dict(self.births)

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Any]]:
        """Runs tasks; yields each with its result, in the order in which they end.

        Tasks are taken from the iterable only as actors can take them. If the caller stops
        early, or a task fails, what was handed out is forgotten.

        Raises:
            PoolError: A task outlived `max_attempts` actors, or no actor is left.
            Exception: The first error that a task itself raised.
        """
        source = iter(tasks)
        again: deque[Task] = deque()
        deaths: Counter[int] = Counter()
        try:
            while self._hand_out(source, again):
                for event in self._wait():
                    if isinstance(event, Done):
                        yield self._take_back(event.ticket), event.value
                    else:
                        again.extendleft(reversed(self._tend(event, deaths)))
        finally:
            self._abandon()

    def call_each(self, method: str) -> dict[int, Any]:
        """Calls a method without arguments on every actor, those included that replace a dead one.

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
                    self._hand(actor, Task(actor, f"{method} of actor {actor}", method, ()))
                for event in self._wait():
                    if isinstance(event, Done):
                        results[self._take_back(event.ticket).key] = event.value
                    else:
                        if isinstance(event, Lost):
                            called.discard(event.actor)
                            results.pop(event.actor, None)
                        self._tend(event, deaths=Counter())
        finally:
            self._abandon()
        return results

    def stop(self) -> None:
        """Ends all actors. Safe to call again."""
        for actor in [*self.births, *self._starting]:
            self._fleet.stop(actor)
        self.births.clear()
        self._starting.clear()
        self._handed_out.clear()
        self._holder.clear()

    def _tend(self, event: Event, deaths: Counter[int]) -> list[Task]:
        """Sees to everything but a result; returns tasks to do again."""
        if isinstance(event, Failed):
            self._take_back(event.ticket)
            raise event.error
        if isinstance(event, Lost):
            return self._bury(event, deaths)
        if isinstance(event, Born):
            self._replace(event)
        elif isinstance(event, NotPlaced):
            self._give_up_place(event)
        elif isinstance(event, NotLoaded):
            self._starting.discard(event.actor)
            self._fleet.stop(event.actor)
            raise event.error
        return []

    def _wait(self) -> Iterator[Event]:
        """What has happened. Events that the caller leaves are there for the next one."""
        self._check_interrupt()
        if not self._events:
            self._events.extend(self._fleet.wait(_WAIT_S))
        while self._events:
            yield self._events.popleft()

    def _start(self, actor: int) -> None:
        self._starting.add(actor)
        self._fleet.start(actor)

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

    def _replace(self, event: Born) -> None:
        """Lets a replacement in, once it is known to hold the same model."""
        self._starting.discard(event.actor)
        try:
            self._admit(event.actor, event.birth)
        except Exception:
            self._fleet.stop(event.actor)
            raise
        self._join(event.actor, event.birth)

    def _join(self, actor: int, birth: Any) -> None:
        self.births[actor] = birth
        self._deaths_at_start.pop(actor, None)
        self._handed_out[actor] = OrderedDict()

    def _give_up_place(self, event: NotPlaced) -> str:
        self._starting.discard(event.actor)
        self._fleet.stop(event.actor)
        _logger.warning("going on without actor %d: %s", event.actor, event.reason)
        if not self.births and not self._starting:
            raise PlacementError(event.reason)
        return event.reason

    def _hand_out(self, source: Iterator[Task], again: deque[Task]) -> bool:
        """Fills the actors up, the emptiest first; returns whether anything is left to wait for."""
        for filled in range(self._tasks_per_actor):
            for actor, handed_out in self._handed_out.items():
                if len(handed_out) == filled:
                    task = again.popleft() if again else next(source, None)
                    if task is None:
                        return any(self._handed_out.values())
                    self._hand(actor, task)
        return True

    def _hand(self, actor: int, task: Task) -> None:
        ticket = self._fleet.submit(actor, task)
        self._handed_out[actor][ticket] = task
        self._holder[ticket] = actor

    def _take_back(self, ticket: Any) -> Task:
        return self._handed_out[self._holder.pop(ticket)].pop(ticket)

    def _bury(self, event: Lost, deaths: Counter[int]) -> list[Task]:
        """Replaces a dead actor; returns the tasks to do again, the one it died over first."""
        if event.actor in self._starting:
            self._start_again(event)
            return []
        handed_out = self._handed_out.pop(event.actor)
        for ticket in handed_out:
            del self._holder[ticket]
        orphans = list(handed_out.values())
        del self.births[event.actor]
        if orphans:
            guilty = orphans[0]
            deaths[guilty.key] += 1
            if deaths[guilty.key] >= self._max_attempts:
                raise PoolError(
                    f"{guilty.name} was being scored when {deaths[guilty.key]} actors died, one "
                    f"after the other: {event.reason} Look for an out-of-memory kill; a smaller "
                    "max_batch_tokens needs less memory."
                )
        _logger.warning("actor %d died and is replaced: %s", event.actor, event.reason)
        self._start(event.actor)
        return orphans

    def _abandon(self) -> None:
        """Forgets what is handed out, so that late results never mix with the next run's."""
        for ticket, actor in self._holder.items():
            self._handed_out[actor].pop(ticket)
            self._fleet.forget(ticket)
        self._holder.clear()
        kept = [event for event in self._events if not isinstance(event, Done | Failed)]
        self._events = deque(kept)
