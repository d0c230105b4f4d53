"""The Ray actor that keeps a named pool, and what it says to those who ask it.

    ask(id, caller, groups) → Answer, or null if it takes longer; then
    wait(id)                → Answer, or null …

A caller that does not come back for its answer is gone, and what it asked for is dropped. Knows
requests and Ray's ways to call an actor; how they are served is `rayreward.service`'s business.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rayreward.config import ModelConfig, PoolConfig, SharingConfig
from rayreward.determinism import DeterminismReport
from rayreward.errors import PoolClosedError
from rayreward.fingerprint import Fingerprint
from rayreward.local import SLICE_ROWS, LocalEngine
from rayreward.merging import Request, RequestQueue
from rayreward.service import Service
from rayreward.types import Outcome, Sample, Version

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.util.placement_group import PlacementGroup

_POLL_S = 10.0
"""How long a call waits for an answer before it says that it takes longer."""

_GONE_S = 10.0
"""A caller that has not come back for so long is gone."""


_FETCH_S = 1.0
"""How long callers have to fetch their last answers before the pool ends."""


@dataclass(frozen=True, slots=True)
class Answer:
    """For each group of a request the outcomes of its samples, and what they come from."""

    outcomes: list[list[Outcome]]
    version: Version


@dataclass(frozen=True, slots=True)
class Held:
    """What a pool holds.

    Attributes:
        model: As settings.
        fingerprint: As hashes.
        version: As a number.
    """

    model: ModelConfig
    fingerprint: Fingerprint
    version: Version


@dataclass(frozen=True, slots=True)
class Status:
    """How a pool is doing.

    Attributes:
        version: What it scores with.
        actors: How many may work.
        rows_waiting: Texts that wait to be handed to one.
        requests: How many have not been answered.
        rows_scored: Texts scored since the pool began.
        tokens_scored: Tokens of those.
        failed: Texts without a reward, by status.
    """

    version: Version
    actors: int
    rows_waiting: int
    requests: int
    rows_scored: int
    tokens_scored: int
    failed: dict[str, int]


@dataclass(slots=True)
class _Open:
    """A request that has not been fetched."""

    request: Request
    answer: asyncio.Future[Answer]
    calls: int = 0
    """That wait for it now."""
    seen_s: float = field(default_factory=time.monotonic)


class Keeper:
    """Holds a pool's actors and answers for it. Made a Ray actor by `rayreward.remote`."""

    def __init__(self) -> None:
        # Ray warns of calls that block an event loop, and takes those on other threads for such
        logging.getLogger("ray._private.worker").addFilter(lambda r: "ray.get" not in r.msg)
        self._open: dict[str, _Open] = {}
        self._started = asyncio.Event()
        self._engine: LocalEngine | None = None
        self._rows = self._tokens = 0
        self._failed: dict[str, int] = {}

    async def start(
        self,
        model: ModelConfig,
        pool: PoolConfig,
        sharing: SharingConfig,
        placement_group: PlacementGroup | None,
    ) -> Held:
        """Brings the actors up; raises what `LocalEngine` raises."""
        engine = await asyncio.to_thread(LocalEngine, model, pool, placement_group)
        queue = RequestQueue(
            max_rows=sharing.max_queued_rows,
            rows_per_task=SLICE_ROWS,
            max_wait_s=sharing.max_wait_ms / 1000,
        )
        self._engine = engine
        self._service = Service(engine.dispatcher, queue, pool.max_attempts)
        self._loop = asyncio.get_running_loop()
        self._reaper = self._loop.create_task(self._drop_what_nobody_fetches())
        self._started.set()
        return self._held()

    async def held(self) -> Held:
        """What the pool holds, once it is up."""
        await self._started.wait()
        return self._held()

    async def ask(self, id_: str, caller: str, groups: Sequence[Sequence[Sample]]) -> Answer | None:
        """Takes a request, unless it is there already, and waits for its answer.

        Raises:
            PoolBusyError: Too much waits already.
            Exception: Why it can't be answered.
        """
        if id_ not in self._open:
            answer: asyncio.Future[Answer] = self._loop.create_future()
            request = Request(caller, groups, self._answer_with(answer))
            if request.rows:
                self._service.submit(request)
            else:
                answer.set_result(Answer([[] for _ in groups], self.engine.version))
            self._open[id_] = _Open(request, answer)
        return await self.wait(id_)

    async def wait(self, id_: str) -> Answer | None:
        """Waits for the answer to a request; null if it takes longer."""
        if id_ not in self._open:
            raise PoolClosedError(
                f"The pool knows of no request {id_}: nobody came back for it within "
                f"{_GONE_S:g} s, and it was dropped. Ask again."
            )
        found = self._open[id_]
        found.calls += 1
        try:
            done, _ = await asyncio.wait([found.answer], timeout=_POLL_S)
            if not done:
                return None
            self._open.pop(id_, None)
            return found.answer.result()
        finally:
            found.calls -= 1
            found.seen_s = time.monotonic()

    async def cancel(self, id_: str) -> None:
        """Drops a request."""
        found = self._open.pop(id_, None)
        if found is not None:
            self._service.cancel(found.request)

    async def update(self, model: str, revision: str | None) -> Held:
        """As `RewardPool.update`; requests are answered by the old model meanwhile."""
        await asyncio.to_thread(self._update, model, revision)
        return self._held()

    async def verify(self) -> DeterminismReport:
        """As `RewardPool.verify`."""
        return await asyncio.wrap_future(self._service.between(self.engine.verify))

    async def actors(self) -> list[ActorHandle[Any]]:
        """Handles of the live actors."""
        return self.engine.actors

    async def status(self) -> Status:
        """How the pool is doing."""
        return Status(
            self.engine.version,
            len(self.engine.dispatcher.births),
            self._service.rows_waiting,
            len(self._open),
            self._rows,
            self._tokens,
            dict(self._failed),
        )

    async def close(self, timeout_s: float) -> None:
        """Answers what has been asked, takes no more, and ends the actors."""
        if self._engine is not None:
            await asyncio.to_thread(self._service.close, timeout_s)
            fetched_by = time.monotonic() + _FETCH_S
            while self._open and time.monotonic() < fetched_by:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(self._engine.close)

    @property
    def engine(self) -> LocalEngine:
        """What is kept."""
        assert self._engine is not None, "start() comes first"
        return self._engine

    def _held(self) -> Held:
        engine = self.engine
        return Held(engine.model, engine.fingerprint, engine.version)

    def _update(self, model: str, revision: str | None) -> None:
        with self.engine.preparing(model, revision) as prepared:
            self._service.between(lambda: self.engine.exchange(prepared)).result()

    def _answer_with(self, future: asyncio.Future[Answer]) -> Any:
        """Settles a future of the event loop, from whatever thread."""

        def answer(request: Request) -> None:
            # now, while nothing else can be: all of it was scored with this version
            version = self.engine.version

            def settle() -> None:
                if future.done():
                    return
                if request.error is not None:
                    future.set_exception(request.error)
                    future.exception()  # nobody need fetch it
                    return
                outcomes: Any = request.outcomes
                self._count(outcomes)
                future.set_result(Answer(outcomes, version))

            self._loop.call_soon_threadsafe(settle)

        return answer

    def _count(self, groups: Sequence[Sequence[Outcome]]) -> None:
        for outcome in (outcome for group in groups for outcome in group):
            self._rows += 1
            self._tokens += outcome.tokens or 0
            status = getattr(outcome, "status", None)
            if status is not None:
                self._failed[str(status)] = self._failed.get(str(status), 0) + 1

    async def _drop_what_nobody_fetches(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            latest = time.monotonic() - _GONE_S
            for id_, found in list(self._open.items()):
                if not found.calls and found.seen_s < latest:
                    await self.cancel(id_)
