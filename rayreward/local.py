"""A pool's actors with the dispatcher that works with them, in this process.

What a pool without a name is, and what the keeper of a named one holds. One thread at a time works
with the dispatcher; others wait.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from ray.exceptions import RayActorError

from rayreward import signals
from rayreward.actor import Birth, HeadState
from rayreward.admission import Admission
from rayreward.checkpoint import at_hand
from rayreward.config import ModelConfig, PoolConfig
from rayreward.determinism import DeterminismReport, compare
from rayreward.dispatch import Dispatcher
from rayreward.errors import DeterminismError, PoolClosedError, PoolError, PoolTimeoutError
from rayreward.events import Task
from rayreward.fingerprint import Fingerprint
from rayreward.fleet import RayConnection, RayFleet
from rayreward.job import PreparedJob, run_job
from rayreward.placement import place
from rayreward.preferences import RowFormat
from rayreward.report import JobReport
from rayreward.types import Outcome, Sample, Version

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.util.placement_group import PlacementGroup

_logger = logging.getLogger("rayreward")

SLICE_ROWS = 64
"""Rows of an in-memory batch that go to one actor at a time: the same whatever the number of
actors, so that it can't be seen in the rewards."""


@dataclasses.dataclass(frozen=True, slots=True)
class Prepared:
    """A model that actors hold beside the one that scores.

    Attributes:
        model: What it was loaded from.
        births: What each of those actors says of it.
        reference: What all of them hold.
        head: Of the first one, where the settings say that it goes to all.
    """

    model: ModelConfig
    births: dict[int, Birth]
    reference: Fingerprint
    head: HeadState | None


class LocalEngine:
    """Actors, loaded alike and checked to be alike, and what they can be asked.

    Attributes:
        model: What the actors hold, as settings.
        version: The same, as a number and hashes.
        dispatcher: For a service that takes it over; then no method here that scores may be used.
    """

    def __init__(
        self,
        model: ModelConfig,
        pool: PoolConfig,
        placement_group: PlacementGroup | None = None,
    ) -> None:
        """Starts the actors and checks that they hold the same model.

        Raises:
            ModelError: The checkpoint can't be loaded as a reward model.
            PlacementError: The cluster has no room for a single actor.
            DeterminismError: The actors hold different models.
        """
        self._lock = threading.RLock()
        self._updating = threading.Lock()
        self._closed = False
        self._deadline: float | None = None
        self.model = at_hand(model)  # what the files can tell is told before Ray starts
        self._pool = pool
        self._admission = Admission(pool.mixed_hardware)
        self._connection = RayConnection(pool.ray_address)
        try:
            placement = place(pool, self._connection.machines(placement_group))
            self._fleet = RayFleet(self.model, placement, pool, placement_group)
            self.dispatcher = Dispatcher(
                self._fleet,
                self._admission,
                num_actors=placement.num_actors,
                tasks_per_actor=pool.tasks_per_actor,
                max_attempts=pool.max_attempts,
                min_actors=pool.min_actors,
                silent_after_s=pool.silent_after_s,
                check_interrupt=self._check_interrupt,
            )
            self.dispatcher.start()
            self._sync_head()
            self._admission.settle(self.dispatcher.births)
            self.dispatcher.review()
            self.version = self._version(1)
        except BaseException:
            self.close()
            raise

    @property
    def actors(self) -> list[ActorHandle[Any]]:
        """Handles of the live actors."""
        self._check_open()
        return [self._fleet.handles[actor] for actor in self.dispatcher.actors]

    @property
    def fingerprint(self) -> Fingerprint:
        """What every actor holds."""
        return self._admission.reference

    def verify(self) -> DeterminismReport:
        """As `RewardPool.verify`."""
        accept = self._pool.mixed_hardware == "accept"
        with self._working():
            report = self._admission.report(self.dispatcher.call_each("fingerprint"))
            try:
                report.raise_if_different(accept_hardware=accept)
            except DeterminismError as error:
                for difference in report.differences:
                    if difference.model or (difference.computed and not accept):
                        self.dispatcher.quarantine(difference.actor, error)
                raise
        return report

    def score_groups(
        self, groups: Sequence[Sequence[Sample]], timeout_s: float | None = None
    ) -> tuple[list[list[Outcome]], Version]:
        """Scores groups of samples that may begin alike; all of them with one version.

        Raises:
            PoolTimeoutError: They were not scored in time.
        """
        with self._working(timeout_s):
            results = self._map("score_samples", ((part,) for part in slices(groups)))
            return [outcomes for part in results for outcomes in part], self.version

    def score_table(
        self, table: pa.Table, row_format: RowFormat, timeout_s: float | None = None
    ) -> pa.Table:
        """Scores the rows of a table; returns the columns to add.

        Raises:
            PoolTimeoutError: They were not scored in time.
        """
        table = _sendable(table)
        rows = (
            table.slice(start, SLICE_ROWS) for start in range(0, max(len(table), 1), SLICE_ROWS)
        )
        with self._working(timeout_s):
            return pa.concat_tables(self._map("score_table", ((part, row_format) for part in rows)))

    def run_job(self, job: PreparedJob) -> JobReport:
        """Runs a job from `rayreward.job.prepare_job`."""
        with self._working():
            return run_job(
                job,
                self.dispatcher,
                self.fingerprint,
                prove=self._pool.recheck_share > 0,
                max_attempts=self._pool.max_attempts,
            )

    def update(self, model: str, revision: str | None = None) -> Version:
        """As `RewardPool.update`."""
        with self.preparing(model, revision) as prepared, self._working():
            return self.exchange(prepared)

    @contextlib.contextmanager
    def preparing(self, model: str, revision: str | None) -> Iterator[Prepared]:
        """Has every actor load another model beside the one that scores, and compares them.

        Inside, `exchange` may be called; what was not exchanged by the end is let go of.

        Raises:
            ModelError: The checkpoint can't be loaded as a reward model.
            DeterminismError: The actors hold different models.
            PoolError: Another update is under way, or no actor is left.
        """
        if not self._updating.acquire(blocking=False):
            raise PoolError("Another update is under way. Wait for it, then try again.")
        try:
            config = dataclasses.replace(
                self.model,
                model=model,
                revision=revision,
                # found with the memory to itself; beside another model it would be less
                max_batch_tokens=self.fingerprint.max_batch_tokens,
            )
            yield self._prepare(at_hand(config))
        except BaseException:
            self._fleet.call_beside(self.dispatcher.actors, "drop_prepared")
            raise
        finally:
            self._updating.release()

    def exchange(self, prepared: Prepared) -> Version:
        """Makes the prepared model the one that scores. Nothing may be under way."""
        self._fleet.model, self._fleet.head = prepared.model, prepared.head
        self._admission.begin_again(prepared.reference)
        there = [actor for actor in prepared.births if actor in self.dispatcher.births]
        errors = self._fleet.call_beside(there, "exchange")
        for actor in self.dispatcher.actors:
            if actor in errors and errors[actor] is None:
                self.dispatcher.births[actor] = prepared.births[actor]
                self._admission.admit(actor, prepared.births[actor])
            else:  # it joined, or was replaced, while the others prepared
                self.dispatcher.replace(actor)
        for actor in self.dispatcher.coming:
            self.dispatcher.replace(actor)
        self.model = prepared.model
        self.version = self._version(self.version.number + 1)
        return self.version

    def close(self) -> None:
        """Ends the actors, and Ray if it was started here. Safe to call again."""
        self._closed = True
        if hasattr(self, "dispatcher"):
            self.dispatcher.stop()
        self._connection.close()

    def _prepare(self, config: ModelConfig) -> Prepared:
        if not self.dispatcher.births:
            raise PoolError("No actor is up that could load the new model. Try again later.")
        first, *others = self.dispatcher.actors
        births = self._call_beside([first], "prepare", config)
        head = None
        if self._pool.head_sync == "broadcast" and _drawn(births):
            head = next(iter(self._call_beside([first], "prepared_head").values()), None)
        births |= self._call_beside(others, "prepare", config, head)
        if not births:
            raise PoolError(
                "Every actor died while it loaded the new model. Look for an "
                "out-of-memory kill: for a while it holds both."
            )
        report = compare({actor: birth.fingerprint for actor, birth in births.items()})
        report.raise_if_different(accept_hardware=self._pool.mixed_hardware != "refuse")
        return Prepared(config, births, report.reference, head)

    def _call_beside(self, actors: Sequence[int], method: str, *args: Any) -> dict[int, Any]:
        """By actor, of those that did not die over it."""
        results = self._fleet.call_beside(actors, method, *args)
        for result in results.values():
            if isinstance(result, Exception) and not isinstance(result, RayActorError):
                raise result
        return {a: result for a, result in results.items() if not isinstance(result, Exception)}

    def _version(self, number: int) -> Version:
        held = self.fingerprint
        return Version(number, self.model.model, held.head, held.body)

    def _sync_head(self) -> None:
        """Gives the first actor's head to all, where the settings ask for it and it was drawn.

        A head that came with the checkpoint is never overwritten: that would hide a bad file.
        """
        births: dict[int, Birth] = self.dispatcher.births
        if self._pool.head_sync == "broadcast" and _drawn(births):
            heads = self.dispatcher.call_each("head_state")
            self._fleet.head = heads[min(heads)]
            births.update(self.dispatcher.call_each("take_head", self._fleet.head))

    def _map(self, method: str, calls: Iterable[tuple[Any, ...]]) -> list[Any]:
        """Calls an actor method for each tuple of arguments; results in the order of the calls."""
        tasks = (Task(key, f"Slice {key}", method, args) for key, args in enumerate(calls))
        # what is void comes again, and the later value stands
        results = {result.task.key: result.value for result in self.dispatcher.run(tasks)}
        return [results[key] for key in range(len(results))]

    @contextlib.contextmanager
    def _working(self, timeout_s: float | None = None) -> Iterator[None]:
        """The turn of one thread to work with the dispatcher, for so long."""
        self._check_open()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        if not self._lock.acquire(timeout=-1 if timeout_s is None else timeout_s):
            raise PoolTimeoutError(_not_in_time(timeout_s))
        try:
            self._deadline = deadline
            yield
        finally:
            self._deadline = None
            self._lock.release()

    def _check_interrupt(self) -> None:
        signals.check()
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise PoolTimeoutError(_not_in_time(None))

    def _check_open(self) -> None:
        if self._closed:
            raise PoolClosedError("The pool is closed. Open a new RewardPool.")


def slices(groups: Sequence[Sequence[Any]]) -> Iterator[Sequence[Sequence[Any]]]:
    """Cuts groups into slices of at least `SLICE_ROWS` items, except for the last."""
    start, items = 0, 0
    for index, group in enumerate(groups):
        items += len(group)
        if items >= SLICE_ROWS:
            yield groups[start : index + 1]
            start, items = index + 1, 0
    if start < len(groups):
        yield groups[start:]


def _drawn(births: dict[int, Birth]) -> bool:
    return all(birth.fingerprint.head_origin == "seeded" for birth in births.values())


def _not_in_time(timeout_s: float | None) -> str:
    given = "the time given" if timeout_s is None else f"{timeout_s:g} s"
    return (
        f"The pool did not answer within {given}. It goes on with other work; ask again, with "
        "more time, fewer texts, or more actors."
    )


def _sendable(table: pa.Table) -> pa.Table:
    """Slices of string_view columns travel with their whole buffers: such text is copied out."""
    schema = pa.schema(
        [
            field.with_type(pa.large_string()) if pa.types.is_string_view(field.type) else field
            for field in table.schema
        ]
    )
    return table.cast(schema)
