"""A pool that lives in an actor of its own, the keeper, as seen from elsewhere in the cluster.

Sends requests in slices, a bounded number at a time, waits for answers, tries again where the pool
is busy, and takes back what is not wanted any more. Does not know how requests are served.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import random
import threading
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError, TaskCancelledError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayreward.checkpoint import at_hand
from rayreward.columns import reward_columns
from rayreward.config import ModelConfig, PoolConfig, SharingConfig
from rayreward.determinism import DeterminismReport
from rayreward.errors import PoolBusyError, PoolClosedError, PoolError, PoolTimeoutError
from rayreward.fingerprint import Fingerprint
from rayreward.fleet import RayConnection
from rayreward.keeper import Answer, Held, Keeper, Status
from rayreward.local import slices
from rayreward.preferences import RowFormat, read_samples
from rayreward.types import Failure, Outcome, Sample, Version

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.util.placement_group import PlacementGroup

NAMESPACE = "rayreward"
"""Ray's namespace for the keepers of named pools."""

_Value = TypeVar("_Value")

_SLICES_AT_ONCE = 8
"""Of one call, so that the queue of the pool has room for others."""

_BUSY_S = (0.02, 1.0)
"""How long to wait before trying a busy pool again: at first, and at most."""

_UNREACHABLE_S = 30.0
"""How long a keeper may be out of reach before it counts as gone."""

_CONNECT_EVERY_S = 0.2

_CALLS_AT_ONCE = 10_000
"""That a keeper takes: each request that waits is one."""


class RemoteEngine:
    """What `LocalEngine` is, for a pool that is kept elsewhere."""

    def __init__(self, name: str, ray_address: str | None = None, timeout_s: float = 0.0) -> None:
        """Does not look for the pool yet: that would be too early where an object is unpickled.

        Args:
            name: Of the pool.
            ray_address: Of its cluster.
            timeout_s: How long to wait for a pool of that name to come.
        """
        self.name = name
        self._ray_address = ray_address or os.environ.get("RAY_ADDRESS") or "auto"
        self._timeout_s = timeout_s
        self._keeper: Any = None
        self._connection: RayConnection | None = None
        self._connecting = threading.Lock()
        self._owns = False
        self._closed = False
        self._caller = uuid.uuid4().hex

    @classmethod
    def create(
        cls,
        name: str,
        model: ModelConfig,
        pool: PoolConfig,
        sharing: SharingConfig,
        placement_group: PlacementGroup | None,
    ) -> RemoteEngine:
        """Brings up a keeper with its actors.

        Raises:
            PoolError: There is a pool of that name.
            Exception: What `LocalEngine` raises.
        """
        model = at_hand(model)
        engine = cls(name)
        engine._connection = RayConnection(pool.ray_address)
        try:
            here = ray.get_runtime_context().get_node_id()
            options: dict[str, Any] = {
                "name": name,
                "namespace": NAMESPACE,
                "lifetime": sharing.lifetime,
                "num_cpus": 0,
                "max_restarts": 0,  # it would come back with the weights that it began with
                "max_concurrency": _CALLS_AT_ONCE,
                "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=True),
            }
            try:
                engine._keeper = ray.remote(**options)(Keeper).remote()
            except ValueError as error:
                raise PoolError(
                    f"There is a pool named {name!r} in this cluster already ({error}). Use it, "
                    f"with RewardPool.connect({name!r}), or choose another name."
                ) from error
            try:
                engine._do("start", model, pool, sharing, placement_group)
            except BaseException:
                ray.kill(engine._keeper)
                raise
            engine._owns = sharing.lifetime is None
            return engine
        except BaseException:
            engine.close()
            raise

    def connect(self) -> None:
        """Finds the pool, unless that is done, and waits until it is up.

        Raises:
            PoolError: There is none, or not in time.
        """
        self._check_open()
        self._held()

    @property
    def actors(self) -> list[ActorHandle[Any]]:
        """Handles of the live actors."""
        found: list[ActorHandle[Any]] = self._do("actors")
        return found

    @property
    def model(self) -> ModelConfig:
        """What the actors hold, as settings."""
        return self._held().model

    @property
    def fingerprint(self) -> Fingerprint:
        """What every actor holds."""
        return self._held().fingerprint

    @property
    def version(self) -> Version:
        """What is scored with now."""
        return self._held().version

    @property
    def status(self) -> Status:
        """How the pool is doing."""
        found: Status = self._do("status")
        return found

    async def status_async(self, timeout_s: float | None = None) -> Status:
        """As `status`, without blocking the event loop.

        Raises:
            PoolTimeoutError: It was not told in time.
        """
        self._check_open()
        return await asyncio.wrap_future(_begin(self._status(timeout_s)))

    def verify(self) -> DeterminismReport:
        """As `RewardPool.verify`."""
        report: DeterminismReport = self._do("verify")
        return report

    def update(self, model: str, revision: str | None = None) -> Version:
        """As `RewardPool.update`."""
        here = Path(model).expanduser()
        if here.is_dir():  # the keeper may work in another directory
            model = str(here.resolve())
        held: Held = self._do("update", model, revision)
        return held.version

    def score_groups(
        self, groups: Sequence[Sequence[Sample]], timeout_s: float | None = None
    ) -> tuple[list[list[Outcome]], Version]:
        """As `LocalEngine.score_groups`."""
        self._check_open()
        return _run(self._score(groups, timeout_s, patient=True))

    async def score_groups_async(
        self,
        groups: Sequence[Sequence[Sample]],
        timeout_s: float | None = None,
        *,
        patient: bool = True,
    ) -> tuple[list[list[Outcome]], Version]:
        """As `score_groups`, without blocking the event loop.

        Args:
            groups: As there.
            timeout_s: As there.
            patient: Whether to try again while the pool is busy, instead of raising PoolBusyError.
        """
        self._check_open()
        score = self._score(groups, timeout_s, patient=patient)
        return await asyncio.wrap_future(_begin(score))

    def score_table(
        self, table: pa.Table, row_format: RowFormat, timeout_s: float | None = None
    ) -> pa.Table:
        """As `LocalEngine.score_table`."""
        rows = read_samples(table, row_format)
        groups = [row for row in rows if not isinstance(row, Failure)]
        scored = iter(self.score_groups(groups, timeout_s)[0])
        outcomes = [row if isinstance(row, Failure) else next(scored) for row in rows]
        return reward_columns(row_format.kind, outcomes)

    def close(self) -> None:
        """Leaves the pool; ends it if it is this object's. Safe to call again."""
        if not self._closed:
            if self._owns:
                self.shut_down(0.0)
            self._closed = True
            if self._connection is not None:
                self._connection.close()

    def shut_down(self, timeout_s: float) -> None:
        """Ends the pool for everybody, once what it has been asked is answered.

        Args:
            timeout_s: After which the rest is answered with an error.
        """
        with contextlib.suppress(PoolClosedError, PoolError):
            self._do("close", timeout_s)
        with contextlib.suppress(Exception):  # it may be dead already, or Ray itself gone
            ray.kill(self._keeper)

    def _held(self) -> Held:
        held: Held = self._do("held")
        return held

    def _do(self, method: str, *args: Any) -> Any:
        self._check_open()
        return _run(self._call(method, *args))

    async def _status(self, timeout_s: float | None) -> Status:
        async with self._in_time(timeout_s):
            found: Status = await self._call("status")
            return found

    async def _score(
        self, groups: Sequence[Sequence[Sample]], timeout_s: float | None, *, patient: bool
    ) -> tuple[list[list[Outcome]], Version]:
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
                f"The pool {self.name!r} did not answer within {timeout_s:g} s. Ask again, with "
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
                    answer: Answer | None = await self._call("ask", id_, self._caller, groups)
                    break
                except PoolBusyError:
                    if not patient:
                        raise
                    await asyncio.sleep(next(pauses))
            while answer is None:
                answer = await self._call("wait", id_)
            return answer
        except asyncio.CancelledError:
            self._keeper.cancel.remote(id_)
            raise

    async def _call(self, method: str, *args: Any) -> Any:
        """Calls the keeper; what it raises is raised here."""
        deadline = time.monotonic() + _UNREACHABLE_S
        while True:
            try:
                return await getattr(self._keeper, method).remote(*args)
            except TaskCancelledError as error:
                # Ray cancels what a task has called together with the task, and may be faster
                raise asyncio.CancelledError from error
            except RayTaskError as error:
                raise error.cause from None
            except ActorUnavailableError as error:
                if time.monotonic() > deadline:
                    raise PoolClosedError(_gone(self.name, error)) from error
                await asyncio.sleep(_BUSY_S[1])
            except RayActorError as error:
                raise PoolClosedError(_gone(self.name, error)) from error

    def _check_open(self) -> None:
        if self._closed:
            raise PoolClosedError(
                f"This object is closed. RewardPool.connect({self.name!r}) finds the pool again, "
                "if it is still there."
            )
        with self._connecting:
            if self._keeper is None:
                self._connection = self._connection or self._enter()
                self._keeper = self._find()

    def _enter(self) -> RayConnection:
        try:
            return RayConnection(self._ray_address)
        except ConnectionError as error:
            raise PoolError(
                f"There is no Ray cluster at {self._ray_address!r} to look for the pool "
                f"{self.name!r} in ({str(error).strip()}). Call ray.init first, set RAY_ADDRESS, "
                "or pass ray_address."
            ) from error

    def _find(self) -> Any:
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                return ray.get_actor(self.name, namespace=NAMESPACE)
            except ValueError:
                if time.monotonic() > deadline:
                    raise PoolError(_no_such_pool(self.name)) from None
                time.sleep(_CONNECT_EVERY_S)


def _begin(call: Coroutine[Any, Any, _Value]) -> Future[_Value]:
    """Begins a call on the event loop of this process's own."""
    return asyncio.run_coroutine_threadsafe(call, _loop())


def _run(call: Coroutine[Any, Any, _Value]) -> _Value:
    """Makes a call; takes it back if the caller is interrupted."""
    future = _begin(call)
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


def _no_such_pool(name: str) -> str:
    named = ray.util.list_named_actors(all_namespaces=True)
    there = sorted(actor["name"] for actor in named if actor["namespace"] == NAMESPACE)
    return (
        f"There is no pool named {name!r} in this cluster; there are: {', '.join(there) or 'none'}."
        f" Open it first: RewardPool(model, name={name!r}, lifetime='detached')."
    )


def _gone(name: str, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"The pool {name!r} is gone: {reason} It ends with the program that opened it, unless "
        "that said lifetime='detached', and with the machine of that program. Open it again."
    )
