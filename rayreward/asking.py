"""What is asked of a pool's keeper: in time, tried again, and taken back when it is not wanted.

Requests go in slices, a bounded number at a time, and again where the pool is busy or was given
other weights meanwhile. Everything runs on one event loop of this process's own, whoever asks.
Knows the keeper's methods; does not know where it is, or who opened it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import threading
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError, TaskCancelledError

from rayreward.errors import PoolBusyError, PoolClosedError, PoolTimeoutError
from rayreward.keeper import Answer, Status
from rayreward.local import slices
from rayreward.types import Outcome, Sample, Version

_Value = TypeVar("_Value")

_SLICES_AT_ONCE = 8
"""Of one call, so that the queue of the pool has room for others."""

_BUSY_S = (0.02, 1.0)
"""How long to wait before trying a busy pool again: at first, and at most."""

_UNREACHABLE_S = 30.0
"""How long a keeper may be out of reach before it counts as gone."""


class Asker:
    """Asks the keeper of one pool, for one object that stands for the pool."""

    def __init__(self, name: str, keeper: Any) -> None:
        """Asks nothing yet.

        Args:
            name: Of the pool.
            keeper: Handle of the actor.
        """
        self.keeper = keeper
        self._name = name
        self._caller = uuid.uuid4().hex

    async def call(self, method: str, *args: Any) -> Any:
        """Calls a method of the keeper.

        Raises:
            PoolClosedError: The keeper is gone.
            Exception: What it raises.
        """
        deadline = time.monotonic() + _UNREACHABLE_S
        while True:
            try:
                return await getattr(self.keeper, method).remote(*args)
            except TaskCancelledError as error:
                # Ray cancels what a task has called together with the task, and may be faster
                raise asyncio.CancelledError from error
            except RayTaskError as error:
                raise error.cause from None
            except ActorUnavailableError as error:
                if time.monotonic() > deadline:
                    raise PoolClosedError(_gone(self._name, error)) from error
                await asyncio.sleep(_BUSY_S[1])
            except RayActorError as error:
                raise PoolClosedError(_gone(self._name, error)) from error

    async def status(self, timeout_s: float | None) -> Status:
        """How the pool is doing.

        Raises:
            PoolTimeoutError: It was not told in time.
        """
        async with self._in_time(timeout_s):
            found: Status = await self.call("status")
            return found

    async def score(
        self, groups: Sequence[Sequence[Sample]], timeout_s: float | None, *, patient: bool
    ) -> tuple[list[list[Outcome]], Version]:
        """As `RemoteEngine.score_groups_async`."""
        async with self._in_time(timeout_s):
            parts = list(slices(groups)) or [[]]
            answers = await self._ask_all(parts, patient)
            while len({answer.version.number for answer in answers}) > 1:
                # the pool was updated meanwhile: what the old weights said is asked again
                newest = max(answer.version.number for answer in answers)
                old = [i for i, a in enumerate(answers) if a.version.number < newest]
                again = await self._ask_all([parts[i] for i in old], patient)
                for i, answer in zip(old, again, strict=True):
                    answers[i] = answer
        return [group for answer in answers for group in answer.outcomes], answers[0].version

    @contextlib.asynccontextmanager
    async def _in_time(self, timeout_s: float | None) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError as error:
            if isinstance(error, PoolTimeoutError):
                raise
            raise PoolTimeoutError(
                f"The pool {self._name!r} did not answer within {timeout_s:g} s. Ask again, with "
                "more time or fewer texts, or give the pool more actors."
            ) from error

    async def _ask_all(
        self, parts: Sequence[Sequence[Sequence[Sample]]], patient: bool
    ) -> list[Answer]:
        room = asyncio.Semaphore(_SLICES_AT_ONCE)

        async def ask(part: Sequence[Sequence[Sample]]) -> Answer:
            async with room:
                return await self._ask(part, patient)

        asking = [asyncio.ensure_future(ask(part)) for part in parts]
        try:
            return list(await asyncio.gather(*asking))
        finally:
            for task in asking:
                task.cancel()

    async def _ask(self, groups: Sequence[Sequence[Sample]], patient: bool) -> Answer:
        id_ = uuid.uuid4().hex
        pauses = _pauses()
        try:
            while True:
                try:
                    answer: Answer | None = await self.call("ask", id_, self._caller, groups)
                    break
                except PoolBusyError:
                    if not patient:
                        raise
                    await asyncio.sleep(next(pauses))
            while answer is None:
                answer = await self.call("wait", id_)
            return answer
        except asyncio.CancelledError:
            self.keeper.cancel.remote(id_)
            raise


def begin(call: Coroutine[Any, Any, _Value]) -> Future[_Value]:
    """Begins a call on the event loop of this process's own."""
    return asyncio.run_coroutine_threadsafe(call, _loop())


def run(call: Coroutine[Any, Any, _Value]) -> _Value:
    """Makes a call; takes it back if the caller is interrupted."""
    future = begin(call)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """One on a thread of its own, which works whether or not the caller has one."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rayreward-pools", daemon=True).start()
    return loop


def _pauses() -> Iterator[float]:
    """Growing, and never the same for two callers."""
    pause, most = _BUSY_S
    while True:
        yield pause * random.uniform(0.5, 1.0)
        pause = min(2 * pause, most)


def _gone(name: str, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"The pool {name!r} is gone: {reason} It ends with the program that opened it, unless "
        "that said lifetime='detached', and with the machine of that program. Open it again."
    )
