"""What to make of deaths, silence and slowness. Pure: time comes from a clock that is handed in.

A machine that goes is nobody's fault. A death is the fault of a task only if the actor did nothing
else: otherwise all that it did is suspect, and each is done again alone. Deaths without end, with
nothing finished between them, have another cause than the tasks.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from statistics import median
from typing import Any

from rayreward.errors import PoolError
from rayreward.events import Task

Remedy = Callable[[Task, int, str], Sequence[Task]]
"""Takes a task, how many actors died over it alone, and why the last one did. Returns the tasks to
do in its place, perhaps itself again; raises PoolError where nothing helps."""

SLOW = 3.0
"""Times the median that a task may take before another actor tries it too."""

_SLOW_AT_LEAST_S = 1.0
_LOOK_EVERY_S = 1.0
_SAMPLES = (3, 101)
"""Fewest and most durations that a median is taken of; the most recent count."""


def retry(max_attempts: int) -> Remedy:
    """The remedy that tries a task again until so many actors have died over it."""

    def remedy(task: Task, deaths: int, reason: str) -> Sequence[Task]:
        if deaths < max_attempts:
            return [task]
        raise PoolError(
            f"{task.name} was being scored when {deaths} actors died, one after the other: "
            f"{reason} Look for an out-of-memory kill; a smaller max_batch_tokens needs less "
            "memory."
        )

    return remedy


class Deaths:
    """Counts deaths and says what to do after one."""

    def __init__(self, most_in_a_row: int) -> None:
        """
        Args:
            most_in_a_row: Deaths, with nothing finished between them, after which it is not the
                tasks.
        """
        self._most = most_in_a_row
        self._in_a_row = 0
        self._over: Counter[Hashable] = Counter()
        self._suspects: set[Hashable] = set()

    def is_suspect(self, task: Task) -> bool:
        """Whether an actor may have died over it: it is to be done alone."""
        return task.key in self._suspects

    def after(self, in_flight: Collection[Task], reason: str, remedy: Remedy) -> list[Task]:
        """An actor has died of itself.

        Args:
            in_flight: What it was doing.
            reason: Why, as far as is known.
            remedy: What to do about a task that was alone.

        Returns:
            What to do again, in order.

        Raises:
            PoolError: It is not the tasks, or the remedy knows none.
        """
        self._in_a_row += 1
        if self._in_a_row > self._most:
            raise PoolError(
                f"{self._in_a_row} actors died and nothing was finished between: {reason} It is "
                "not one row or shard, then. Look at the machines: out-of-memory kills, a driver "
                "or a device that fails. What is committed stays; the same command goes on."
            )
        again = list(in_flight)
        if len(again) == 1:
            [task] = again
            self._over[task.key] += 1
            again = list(remedy(task, self._over[task.key], reason))
        self._suspects.update(task.key for task in again)
        return again

    def finished(self, task: Task) -> None:
        """A task was finished: no actor died over it."""
        self._in_a_row = 0
        self._suspects.discard(task.key)

    def clear(self) -> None:
        """Begins anew, with other tasks."""
        self._in_a_row = 0
        self._over.clear()
        self._suspects.clear()


class Watch:
    """Knows since when calls are under way, and tells which are slow and who is silent."""

    def __init__(self, clock: Callable[[], float], silent_after_s: float) -> None:
        """
        Args:
            clock: Seconds that only grow.
            silent_after_s: How long a busy actor may give no sign of getting on.
        """
        self._clock = clock
        self._silent_after_s = silent_after_s
        self._began: dict[Any, float] = {}
        self._durations: deque[float] = deque(maxlen=_SAMPLES[1])
        self._signs: dict[int, tuple[int | None, float]] = {}
        self._looked = -math.inf

    def began(self, actor: int, ticket: Any) -> None:
        """A call has been handed to an actor."""
        self._began[ticket] = self._clock()
        count, _ = self._signs.get(actor, (None, 0.0))
        self._signs[actor] = count, self._clock()

    def ended(self, actor: int, ticket: Any, *, done: bool) -> None:
        """A call is over: done, or forgotten."""
        began, now = self._began.pop(ticket), self._clock()
        if done:
            self._durations.append(now - began)
            count, _ = self._signs.get(actor, (None, 0.0))
            self._signs[actor] = count, now

    def sign(self, actor: int, count: int) -> None:
        """An actor has answered; that it gets on shows in the count."""
        before, _ = self._signs.get(actor, (None, 0.0))
        if count != before:
            self._signs[actor] = count, self._clock()

    def gone(self, actor: int) -> None:
        """An actor is no more."""
        self._signs.pop(actor, None)

    def silent(self, busy: Iterable[int]) -> list[int]:
        """Which of the busy actors have not got on for too long."""
        now = self._clock()
        if now - self._looked < _LOOK_EVERY_S:
            return []
        self._looked = now
        return [a for a in busy if now - self._signs[a][1] > self._silent_after_s]

    def slow(self, tickets: Collection[Any]) -> list[Any]:
        """Which calls take far longer than others did, the oldest first."""
        if len(self._durations) < _SAMPLES[0]:
            return []
        limit = max(SLOW * median(self._durations), _SLOW_AT_LEAST_S)
        latest = self._clock() - limit
        slow = [ticket for ticket in tickets if self._began[ticket] < latest]
        return sorted(slow, key=self._began.__getitem__)
