"""A pool that lives in an actor of its own, the keeper, as seen from elsewhere in the cluster.

Opens it, finds it and ends it. Does not know how the keeper is asked, or how it serves requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayreward.asking import Asker, begin, run
from rayreward.checkpoint import at_hand
from rayreward.columns import reward_columns
from rayreward.config import ModelConfig, PoolConfig, SharingConfig
from rayreward.determinism import DeterminismReport
from rayreward.errors import PoolClosedError, PoolError
from rayreward.fingerprint import Fingerprint
from rayreward.fleet import RayConnection
from rayreward.keeper import Held, Keeper, Status
from rayreward.preferences import RowFormat, read_samples
from rayreward.types import Failure, Outcome, Sample, Version

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.util.placement_group import PlacementGroup

NAMESPACE = "rayreward"
"""Ray's namespace for the keepers of named pools."""

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
        self._asking: Asker | None = None
        self._connection: RayConnection | None = None
        self._connecting = threading.Lock()
        self._owns = False
        self._closed = False

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
                keeper: Any = ray.remote(**options)(Keeper).remote()
            except ValueError as error:
                raise PoolError(
                    f"There is a pool named {name!r} in this cluster already ({error}). Use it, "
                    f"with RewardPool.connect({name!r}), or choose another name."
                ) from error
            engine._asking = Asker(name, keeper)
            try:
                engine._do("start", model, pool, sharing, placement_group)
            except BaseException:
                ray.kill(keeper)
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
        return run(self._asker().status(None))

    async def status_async(self, timeout_s: float | None = None) -> Status:
        """As `status`, without blocking the event loop.

        Raises:
            PoolTimeoutError: It was not told in time.
        """
        return await asyncio.wrap_future(begin(self._asker().status(timeout_s)))

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
        return run(self._asker().score(groups, timeout_s, patient=True))

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
        score = self._asker().score(groups, timeout_s, patient=patient)
        return await asyncio.wrap_future(begin(score))

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
        if self._asking is not None:
            with contextlib.suppress(Exception):  # it may be dead already, or Ray itself gone
                ray.kill(self._asking.keeper)

    def _held(self) -> Held:
        held: Held = self._do("held")
        return held

    def _do(self, method: str, *args: Any) -> Any:
        return run(self._asker().call(method, *args))

    def _asker(self) -> Asker:
        """Who asks the keeper, which is looked for the first time.

        Raises:
            PoolClosedError: This object is closed.
            PoolError: There is no such pool, or not in time.
        """
        if self._closed:
            raise PoolClosedError(
                f"This object is closed. RewardPool.connect({self.name!r}) finds the pool again, "
                "if it is still there."
            )
        with self._connecting:
            if self._asking is None:
                self._connection = self._connection or self._enter()
                self._asking = Asker(self.name, self._find())
            return self._asking

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


def _no_such_pool(name: str) -> str:
    named = ray.util.list_named_actors(all_namespaces=True)
    there = sorted(actor["name"] for actor in named if actor["namespace"] == NAMESPACE)
    return (
        f"There is no pool named {name!r} in this cluster; there are: {', '.join(there) or 'none'}."
        f" Open it first: RewardPool(model, name={name!r}, lifetime='detached')."
    )
