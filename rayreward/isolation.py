"""Finds the rows over which actors die, by halving their shard, so that the others get rewards.

A shard that outlived too many actors is tried in halves: a half that comes through is innocent,
one over which an actor dies is halved again. A single row is guilty only after as many deaths as
make a shard suspect. Then the whole shard is scored once more without the guilty rows. Nothing is
kept of a try, so the part is written by one actor in one piece, whatever went before.

Pure: decides about tasks; does not know Ray, files or rewards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rayreward.errors import PoolError
from rayreward.events import Task

TRY = "try_rows"
"""The actor method that scores some rows of a shard and keeps nothing."""

Range = tuple[int, int]
"""First row and the one behind the last."""


@dataclass(slots=True)
class _Case:
    """A shard under suspicion."""

    whole: Task
    rows: int
    untried: dict[Range, Task] = field(default_factory=dict)
    guilty: set[int] = field(default_factory=set)
    closed: bool = False


class Isolation:
    """Decides about the tasks of a job. `after_death` is a `rayreward.failures.Remedy`."""

    def __init__(
        self,
        max_attempts: int,
        rows_of: Callable[[Task], int],
        without: Callable[[Task, Sequence[int]], Task],
    ) -> None:
        """
        Args:
            max_attempts: Deaths that make a shard, or a single row, guilty.
            rows_of: How many rows the shard of a task has.
            without: The task that scores the same shard but for some of its rows.
        """
        self._max_attempts = max_attempts
        self._rows_of = rows_of
        self._without = without
        self._cases: dict[object, _Case] = {}
        self._by_try: dict[object, tuple[_Case, Range]] = {}

    def after_death(self, task: Task, deaths: int, reason: str) -> list[Task]:
        """What to do in place of a task over which actors died.

        Raises:
            PoolError: The shard kills actors as a whole only, which no row explains.
        """
        if task.key in self._by_try:
            return self._halve(task, deaths)
        if deaths < self._max_attempts:
            return [task]
        case = self._cases.setdefault(task.key, _Case(task, self._rows_of(task)))
        if case.closed:
            raise PoolError(
                f"{task.name} was being scored when {deaths} actors died, but none dies over a "
                f"part of it alone: {reason} Look for an out-of-memory kill; smaller shards "
                "(rows_per_shard) or a smaller max_batch_tokens need less memory."
            )
        return self._split(case, (0, case.rows))

    def after_success(self, task: Task) -> list[Task]:
        """What to do once a try came through: often nothing yet. Safe to call again."""
        found = self._by_try.pop(task.key, None)
        if found is None:
            return []
        case, tried = found
        del case.untried[tried]
        return self._close(case)

    def _halve(self, task: Task, deaths: int) -> list[Task]:
        case, (first, end) = self._by_try[task.key]
        if end - first == 1 and deaths < self._max_attempts:
            return [task]
        del self._by_try[task.key], case.untried[first, end]
        if end - first > 1:
            return self._split(case, (first, end))
        case.guilty.add(first)
        return self._close(case)

    def _split(self, case: _Case, rows: Range) -> list[Task]:
        first, end = rows
        middle = (first + end) // 2
        halves = [half for half in ((first, middle), (middle, end)) if half[0] < half[1]]
        tries = [self._try(case, half) for half in halves]
        for half, task in zip(halves, tries, strict=True):
            case.untried[half] = task
            self._by_try[task.key] = case, half
        return tries

    def _try(self, case: _Case, rows: Range) -> Task:
        first, end = rows
        name = f"{case.whole.name}, rows {first} to {end - 1}"
        return Task((case.whole.key, *rows), name, TRY, (*case.whole.args, *rows))

    def _close(self, case: _Case) -> list[Task]:
        if case.untried:
            return []
        case.closed = True
        return [self._without(case.whole, sorted(case.guilty))]
