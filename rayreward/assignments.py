"""Which actor is at which task, and which of its results still wait for a proof.

Bookkeeping: what is handed out, taken back, slow or silent. What is done about it is the
dispatcher's (`rayreward.dispatch`). Does not know Ray.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

from rayreward.events import Alive, Done, Task
from rayreward.failures import Watch


@dataclass(frozen=True, slots=True)
class Result:
    """What `Dispatcher.run` yields: a task with its value, or that it is now proven, or void.

    Each value is yielded when it comes in, `proven` being null, and again later: proven, because
    its actor was found sound after it; or void, because its actor was found bad, or died before
    the proof that the run insists on. A task whose value is void is done again.
    """

    task: Task
    value: Any
    proven: bool | None = None


class Assignments:
    """Tasks that actors have been handed. Each call has a ticket, from `Fleet.submit`."""

    def __init__(self, clock: Callable[[], float], silent_after_s: float) -> None:
        """
        Args:
            clock: Seconds that only grow.
            silent_after_s: How long a busy actor may give no sign of getting on.
        """
        self._watch = Watch(clock, silent_after_s)
        self._tasks: dict[int, OrderedDict[Any, Task]] = {}
        self._holders: dict[Any, int] = {}
        self._at: defaultdict[int, dict[int, None]] = defaultdict(dict)  # so many tasks: in order
        self._doubled: set[Hashable] = set()

    def __contains__(self, ticket: Any) -> bool:
        return ticket in self._holders

    def __len__(self) -> int:
        """How many calls are under way."""
        return len(self._holders)

    def join(self, actor: int) -> None:
        """An actor may be handed tasks from now on."""
        self._tasks[actor] = OrderedDict()
        self._at[0][actor] = None

    def leave(self, actor: int) -> list[Task]:
        """An actor is handed no more; returns what it was at."""
        tasks = self._tasks.pop(actor)
        del self._at[len(tasks)][actor]
        for ticket in tasks:
            del self._holders[ticket]
            self._watch.ended(actor, ticket, done=False)
        self._watch.gone(actor)
        return list(tasks.values())

    def add(self, actor: int, ticket: Any, task: Task) -> None:
        """A task has been handed to an actor."""
        tasks = self._tasks[actor]
        tasks[ticket] = task
        self._move(actor, len(tasks) - 1)
        self._holders[ticket] = actor
        self._watch.began(actor, ticket)

    def remove(self, ticket: Any, *, done: bool = True) -> tuple[int, Task]:
        """A call is over, done or forgotten; returns the actor and the task."""
        actor = self._holders.pop(ticket)
        self._watch.ended(actor, ticket, done=done)
        tasks = self._tasks[actor]
        task = tasks.pop(ticket)
        self._move(actor, len(tasks) + 1)
        return actor, task

    def clear(self) -> list[Any]:
        """Forgets all calls, and returns their tickets."""
        tickets = list(self._holders)
        for ticket in tickets:
            self.remove(ticket, done=False)
        self._doubled.clear()
        return tickets

    def of(self, actor: int) -> Collection[Task]:
        """What an actor is at."""
        return self._tasks[actor].values()

    def actors_with(self, number: int) -> list[int]:
        """Who is at so many tasks: who has been for longest comes first."""
        return list(self._at[number])

    def keys(self) -> set[Hashable]:
        """Of all tasks that somebody is at."""
        return {task.key for tasks in self._tasks.values() for task in tasks.values()}

    def slow(self) -> list[Task]:
        """Tasks that take too long and that only one actor has, the oldest first."""
        slow = (self._tasks[self._holders[t]][t] for t in self._watch.slow(self._holders))
        return [task for task in slow if task.key not in self._doubled and not task.is_proof]

    def double(self, task: Task) -> None:
        """Another actor is about to be handed it too."""
        self._doubled.add(task.key)

    def take_doubles(self, task: Task) -> list[Any]:
        """A task is done: takes it from whoever else is at it; returns their tickets."""
        if task.key not in self._doubled:
            return []
        self._doubled.discard(task.key)
        tickets = [t for t, actor in self._holders.items() if self._tasks[actor][t].key == task.key]
        for ticket in tickets:
            self.remove(ticket, done=False)
        return tickets

    def sign(self, event: Alive) -> None:
        """A busy actor has answered."""
        self._watch.sign(event.actor, event.count)

    def silent(self) -> list[int]:
        """Busy actors that have not got on for too long."""
        return self._watch.silent(actor for actor, tasks in self._tasks.items() if tasks)

    def _move(self, actor: int, before: int) -> None:
        """An actor had so many tasks before."""
        del self._at[before][actor]
        self._at[len(self._tasks[actor])][actor] = None


class Unproven:
    """Results that wait for their actor to prove that it is sound."""

    def __init__(self) -> None:
        self._results: dict[int, list[tuple[float, Result]]] = {}

    def join(self, actor: int) -> None:
        """An actor begins, or begins anew, with nothing to prove."""
        self._results[actor] = []

    def leave(self, actor: int) -> list[Result]:
        """An actor was found bad, or is gone; returns what it has not proven, as void."""
        return [Result(r.task, r.value, proven=False) for _, r in self._results.pop(actor)]

    def add(self, actor: int, event: Done, results: Iterable[Result]) -> None:
        """Results have come in."""
        self._results[actor] += [(event.done_s, result) for result in results]

    def prove(self, actor: int, looked_s: float) -> list[Result]:
        """An actor was sound at a time by its clock; returns what that proves."""
        results = self._results[actor]
        self._results[actor] = [(at, r) for at, r in results if at > looked_s]
        return [Result(r.task, r.value, proven=True) for at, r in results if at <= looked_s]

    def actors(self) -> list[int]:
        """Who has something to prove."""
        return [actor for actor, results in self._results.items() if results]
