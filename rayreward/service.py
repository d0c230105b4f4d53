"""The requests of many callers served by one dispatcher, on a thread of its own.

Knows when requests are handed out, what becomes of those that kill actors, and when nothing is
under way, so that weights can be exchanged. Does not know Ray, or how a request came here.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from rayreward.dispatch import Dispatcher
from rayreward.errors import PoolClosedError
from rayreward.events import Task
from rayreward.merging import Canceled, Piece, Request, RequestQueue
from rayreward.types import Failure, Status

_logger = logging.getLogger("rayreward")

_LOOK_EVERY_S = 0.5
"""How often actors are attended to while there is nothing to do."""

_REVIVE_EVERY_S = 60.0
"""How often it is tried again to bring up an actor that could not be."""

POISON = Failure(Status.POISON, "actors died over this text, again and again, and over it alone")

_METHOD = "score_samples"


class Service:
    """Answers requests until it is closed. All methods may be called from any thread."""

    def __init__(self, dispatcher: Dispatcher, queue: RequestQueue, max_attempts: int) -> None:
        """
        Args:
            dispatcher: With its actors up and checked. From now on it is this object's alone.
            queue: Where requests wait.
            max_attempts: Actors that may die over one text.
        """
        self._dispatcher = dispatcher
        self._queue = queue
        self._max_attempts = max_attempts
        self._changed = threading.Condition()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._again: deque[list[Piece]] = deque()
        self._pieces: dict[Hashable, list[Piece]] = {}
        self._keys = itertools.count()
        self._revived_s = time.monotonic()
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="rayreward-service", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Takes a request in; it will be answered.

        Raises:
            PoolBusyError: Too much waits already.
            PoolClosedError: No more requests are taken.
        """
        with self._changed:
            if self._closing:
                raise PoolClosedError("The pool is closing. Open another, or connect to another.")
            self._queue.put(request)
            self._changed.notify()

    def cancel(self, request: Request) -> None:
        """Drops a request; what an actor is at already goes on and is thrown away."""
        with self._changed:
            self._queue.remove(request, Canceled("The request was taken back."))

    def between(self, call: Callable[[], Any]) -> Future[Any]:
        """Makes a call while no request is half done and no actor scores anything."""
        future: Future[Any] = Future()
        with self._changed:
            if self._closing:
                raise PoolClosedError("The pool is closing. Open another, or connect to another.")
            self._calls.append((call, future))
            self._changed.notify()
        return future

    @property
    def rows_waiting(self) -> int:
        """Texts that wait to be handed out."""
        return self._queue.rows

    def close(self, timeout_s: float | None = None) -> None:
        """Takes no more requests, and ends once those that are there are answered.

        Args:
            timeout_s: After which the others are answered with an error. Null: never.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._fail_all(PoolClosedError("The pool was closed before this was scored."))

    def _serve(self) -> None:
        while not self._closing or self._queue.rows or self._again:
            try:
                self._make_calls()
                self._revive()
                self._dispatcher.look()
                for result in self._dispatcher.serve(
                    _Tasks(self._next_task), remedy=self._after_death, fail=self._after_error
                ):
                    if result.proven is None:
                        self._deliver(self._pieces.pop(result.task.key, []), result.value)
                self._rest()
            except Exception as error:
                _logger.exception("the pool can't go on with what it was doing")
                self._fail_all(error)

    def _make_calls(self) -> None:
        while self._calls:
            call, future = self._calls.popleft()
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)

    def _revive(self) -> None:
        """Brings actors up again, at once where there is work and nobody to do it."""
        nobody = not self._dispatcher.births and self._queue.rows
        if nobody or time.monotonic() - self._revived_s > _REVIVE_EVERY_S:
            self._revived_s = time.monotonic()
            self._dispatcher.revive()

    def _rest(self) -> None:
        """Waits until there is something to do."""
        with self._changed:
            ready = self._queue.ready_in()
            if not (self._calls or self._again or (self._closing and ready is None)):
                self._changed.wait(_LOOK_EVERY_S if ready is None else min(ready, _LOOK_EVERY_S))

    def _next_task(self) -> Task | None:
        """The next batch, if there is one now; while a call waits, only of what is half done."""
        while True:
            with self._changed:
                if self._again:
                    pieces = self._again.popleft()
                else:
                    pieces = self._queue.take(begun_only=bool(self._calls))
            if not pieces:
                return None
            if wanted := [piece for piece in pieces if not piece.request.done]:
                return self._task(wanted)

    def _task(self, pieces: list[Piece]) -> Task:
        key = next(self._keys)
        self._pieces[key] = pieces
        rows = sum(piece.rows for piece in pieces)
        name = f"A batch of {rows} texts"
        return Task(key, name, _METHOD, ([piece.samples for piece in pieces],))

    def _deliver(self, pieces: Sequence[Piece], outcomes: Sequence[Any]) -> None:
        for piece, found in zip(pieces, outcomes, strict=False):
            piece.request.receive(piece, found)

    def _after_death(self, task: Task, deaths: int, reason: str) -> list[Task]:
        """An actor died over a task alone: halves it, down to the text that kills."""
        pieces = self._pieces.pop(task.key, [])
        if len(pieces) > 1:
            middle = len(pieces) // 2
            halves = [pieces[:middle], pieces[middle:]]
        elif pieces and pieces[0].rows > 1:
            halves = [[half] for half in pieces[0].halves()]
        elif deaths < self._max_attempts:
            self._pieces[task.key] = pieces
            return [task]
        else:
            _logger.warning("a text gets no reward, %d actors died over it: %s", deaths, reason)
            self._deliver(pieces, [[POISON]])
            return []
        return [self._task(half) for half in halves]

    def _after_error(self, task: Task, error: BaseException) -> None:
        """A task raised an error: whose of the requests in it, shows when each is done alone."""
        pieces = self._pieces.pop(task.key, [])
        requests = list(dict.fromkeys(piece.request for piece in pieces))
        if len(requests) == 1:
            requests[0].fail(error)
            return
        for request in requests:
            self._again.append([piece for piece in pieces if piece.request is request])

    def _fail_all(self, error: BaseException) -> None:
        with self._changed:
            self._queue.remove_all(error)
            under_way = [piece for pieces in self._pieces.values() for piece in pieces]
            under_way += [piece for pieces in self._again for piece in pieces]
            self._pieces.clear()
            self._again.clear()
        for piece in under_way:
            piece.request.fail(error)


class _Tasks(Iterator[Task]):
    """Tasks, as long as there are any; there may be more later."""

    def __init__(self, take: Callable[[], Task | None]) -> None:
        self._take = take

    def __next__(self) -> Task:
        task = self._take()
        if task is None:
            raise StopIteration
        return task
