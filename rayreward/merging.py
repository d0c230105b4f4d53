"""Requests of many callers, merged into tasks: fair, bounded, and none waits long for company.

Pure: time comes from a clock that is handed in. Does not know actors, threads, or how a request
came here.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

from rayreward.errors import PoolBusyError, PoolError
from rayreward.types import Outcome, Sample


class Request:
    """Groups of samples that one caller wants scored, and what has become of them.

    Attributes:
        caller: Who asks.
        groups: The samples; those of a group may begin alike.
        outcomes: For each group the outcomes of its samples, null where there is none yet.
        error: Why there will be no outcomes, or null.
    """

    def __init__(
        self,
        caller: Hashable,
        groups: Sequence[Sequence[Sample]],
        answer: Callable[[Request], None] = lambda request: None,
    ) -> None:
        """
        Args:
            caller: As in the attributes.
            groups: As in the attributes.
            answer: Called once: when all outcomes are there, or an error.
        """
        self.caller = caller
        self.groups = groups
        self.outcomes: list[list[Outcome | None]] = [[None] * len(group) for group in groups]
        self.error: BaseException | None = None
        self.rows = sum(map(len, groups))
        self._missing: int = self.rows
        self._answer = answer
        self._untaken = deque(index for index, group in enumerate(groups) if group)
        self.rows_waiting = self.rows
        self.arrived_s = 0.0

    @property
    def done(self) -> bool:
        """Whether it has been answered."""
        return self.error is not None or not self._missing

    @property
    def begun(self) -> bool:
        """Whether some of it, and not all, has been handed out."""
        return 0 < self.rows_waiting < self.rows

    def take(self) -> Piece:
        """The next group to hand out."""
        index = self._untaken.popleft()
        piece = Piece(self, index, 0, len(self.groups[index]))
        self.rows_waiting -= piece.rows
        return piece

    def receive(self, piece: Piece, outcomes: Sequence[Outcome]) -> None:
        """Takes the outcomes of a piece. Too late is no matter."""
        if not self.done:
            self.outcomes[piece.group][piece.start : piece.stop] = outcomes
            self._missing -= piece.rows
            if not self._missing:
                self._answer(self)

    def fail(self, error: BaseException) -> None:
        """There will be no outcomes. Too late is no matter."""
        if not self.done:
            self.error = error
            self._answer(self)


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Some samples of one group of a request: those from `start` to before `stop`."""

    request: Request
    group: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """How many samples there are."""
        return self.stop - self.start

    @property
    def samples(self) -> Sequence[Sample]:
        """The samples."""
        return self.request.groups[self.group][self.start : self.stop]

    def halves(self) -> Iterator[Piece]:
        """The same samples in two pieces."""
        middle = (self.start + self.stop) // 2
        yield Piece(self.request, self.group, self.start, middle)
        yield Piece(self.request, self.group, middle, self.stop)


class RequestQueue:
    """What is to be handed out.

    Callers take turns by rows: who has been given least is next, whatever the size of requests.
    """

    def __init__(
        self,
        *,
        max_rows: int,
        rows_per_task: int,
        max_wait_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            max_rows: How many may wait.
            rows_per_task: How many are worth a task.
            max_wait_s: How long fewer than that wait for company.
            clock: Seconds that only grow.
        """
        self.rows = 0
        self._max_rows = max_rows
        self._rows_per_task = rows_per_task
        self._max_wait_s = max_wait_s
        self._clock = clock
        self._requests: dict[Hashable, deque[Request]] = {}
        self._turns: list[tuple[int, int, Hashable]] = []
        self._order = itertools.count()
        self._given = 0

    def put(self, request: Request) -> None:
        """Adds a request.

        Raises:
            PoolBusyError: Too much waits already.
        """
        if self.rows and self.rows + request.rows > self._max_rows:
            raise PoolBusyError(
                f"The pool has {self.rows} texts waiting, and max_queued_rows={self._max_rows}: "
                f"{request.rows} more are too many now. Try again in a moment, with more actors, "
                "or with fewer texts at a time."
            )
        request.arrived_s = self._clock()
        if request.caller not in self._requests:
            self._requests[request.caller] = deque()
            heapq.heappush(self._turns, (self._given, next(self._order), request.caller))
        self._requests[request.caller].append(request)
        self.rows += request.rows

    def remove(self, request: Request, error: BaseException) -> None:
        """Takes a request out, and answers it with an error."""
        if not request.done:
            self.rows -= request.rows_waiting
            request.fail(error)

    def remove_all(self, error: BaseException) -> None:
        """Answers every request that waits with an error."""
        for requests in self._requests.values():
            for request in requests:
                self.remove(request, error)

    def ready_in(self) -> float | None:
        """Seconds until there is something to take; null while nothing waits."""
        if not self.rows:
            return None
        if self.rows >= self._rows_per_task:
            return 0.0
        oldest = min(
            request.arrived_s
            for requests in self._requests.values()
            for request in requests
            if not request.done and request.rows_waiting
        )
        return max(0.0, oldest + self._max_wait_s - self._clock())

    def take(self, *, begun_only: bool = False) -> list[Piece]:
        """What one task is to do; nothing while it is worth waiting for more.

        Args:
            begun_only: Only of requests of which some has been handed out already.
        """
        if begun_only:
            return [piece for request in self._begun() for piece in self._take_of(request)]
        pieces: list[Piece] = []
        if self.ready_in() != 0.0:
            return pieces
        rows = 0
        while rows < self._rows_per_task and self._turns:
            given, _, caller = heapq.heappop(self._turns)
            requests = self._requests[caller]
            while requests and (requests[0].done or not requests[0].rows_waiting):
                requests.popleft()
            if not requests:
                del self._requests[caller]
                continue
            piece = requests[0].take()
            pieces.append(piece)
            rows += piece.rows
            self._given = given
            heapq.heappush(self._turns, (given + piece.rows, next(self._order), caller))
        self.rows -= rows
        return pieces

    def _begun(self) -> Iterator[Request]:
        for requests in self._requests.values():
            for request in requests:
                if request.begun and not request.done:
                    yield request

    def _take_of(self, request: Request) -> Iterator[Piece]:
        while request.rows_waiting:
            piece = request.take()
            self.rows -= piece.rows
            yield piece


class Canceled(PoolError):
    """A request was taken back by its caller, or its caller is gone."""
