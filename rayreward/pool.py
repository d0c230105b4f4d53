"""`RewardPool`: reward models on a Ray cluster behind one object."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayreward import signals
from rayreward.actor import Birth, reward_or_nan
from rayreward.admission import Admission
from rayreward.checkpoint import local_directory, open_checkpoint
from rayreward.columns import check_free
from rayreward.config import JobConfig, ModelConfig, PoolConfig
from rayreward.determinism import DeterminismReport
from rayreward.dispatch import Dispatcher
from rayreward.errors import DataError, DeterminismError, PoolClosedError
from rayreward.events import Task
from rayreward.fingerprint import Fingerprint
from rayreward.fleet import RayConnection, RayFleet
from rayreward.job import PreparedJob, prepare_job, run_job
from rayreward.placement import place
from rayreward.preferences import check_schema
from rayreward.report import JobReport
from rayreward.types import Failure, Outcome

if TYPE_CHECKING:
    from ray.actor import ActorHandle

_logger = logging.getLogger("rayreward")

SLICE_ROWS = 64
"""Rows of an in-memory batch that go to one actor at a time: the same whatever the number of
actors, so that it can't be seen in the rewards."""


class RewardPool:
    """Reward models on a Ray cluster, loaded alike, checked to be alike, and kept alive.

    Use it as a context manager, or call `close()`:

        with RewardPool("path/or/hub-id", seed=42) as pool:
            rewards = pool.score(["What is 2 + 2? It is 4.", "What is 2 + 2? It is 5."])

    The pool starts Ray, and ends it, only where Ray is not running yet. Its methods may be called
    from several threads; calls are served one after the other.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        revision: str | None = None,
        seed: int | None = None,
        head: Literal["auto", "trained", "seeded"] = "auto",
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        max_length: int | None = None,
        truncation: Literal["error-row", "left", "right"] = "error-row",
        max_batch_tokens: int | Literal["auto"] = "auto",
        batch_invariant: bool | Literal["auto"] = "auto",
        share_prefixes: bool = True,
        pad_token: str | None = None,
        num_actors: int | Literal["auto"] = "auto",
        min_actors: int | None = None,
        num_gpus_per_actor: float | None = None,
        num_cpus_per_actor: float | None = None,
        placement_timeout_s: float = 60.0,
        tasks_per_actor: int = 2,
        max_attempts: int = 3,
        silent_after_s: float = 900.0,
        head_sync: Literal["verify", "broadcast"] = "verify",
        mixed_hardware: Literal["refuse", "alike", "accept"] = "refuse",
        recheck_share: float = 0.005,
        ray_address: str | None = None,
    ) -> None:
        """Starts the actors and checks that they hold the same model.

        The arguments are the fields of `ModelConfig` and `PoolConfig` (`rayreward.config`), which
        describe them.

        Raises:
            ConfigError: A setting is out of range.
            ModelError: The checkpoint can't be loaded as a reward model.
            PlacementError: The cluster has no room for a single actor.
            DeterminismError: The actors hold different models.
        """
        settings = {key: value for key, value in locals().items() if key not in ("self", "model")}
        self._start(
            ModelConfig(model=os.fspath(model), **_fields_of(ModelConfig, settings)),
            PoolConfig(**_fields_of(PoolConfig, settings)),
        )

    @classmethod
    def from_config(cls, model: ModelConfig, pool: PoolConfig | None = None) -> Self:
        """Like the constructor, from configs."""
        self = cls.__new__(cls)
        self._start(model, pool or PoolConfig())
        return self

    def _start(self, model: ModelConfig, pool: PoolConfig) -> None:
        self._lock = threading.RLock()
        self._closed = False
        directory = local_directory(model.model)
        if directory is not None:
            open_checkpoint(str(directory))  # what the files can tell is told before Ray starts
            model = dataclasses.replace(model, model=str(directory))
        self.model_config = model
        self._pool_config = pool
        self._admission = Admission(pool.mixed_hardware)
        self._connection = RayConnection(pool.ray_address)
        try:
            placement = place(pool, self._connection.machines())
            self._fleet = RayFleet(model, placement, pool)
            self._dispatcher = Dispatcher(
                self._fleet,
                self._admission,
                num_actors=placement.num_actors,
                tasks_per_actor=pool.tasks_per_actor,
                max_attempts=pool.max_attempts,
                min_actors=pool.min_actors,
                silent_after_s=pool.silent_after_s,
                check_interrupt=signals.check,
            )
            self._dispatcher.start()
            self._sync_head()
            self._admission.settle(self._dispatcher.births)
            self._dispatcher.review()
        except BaseException:
            self.close()
            raise

    def _sync_head(self) -> None:
        """Gives the first actor's head to all, where the settings ask for it and it was drawn.

        A head that came with the checkpoint is never overwritten: that would hide a bad file.
        """
        births: dict[int, Birth] = self._dispatcher.births
        drawn = all(birth.fingerprint.head_origin == "seeded" for birth in births.values())
        if self._pool_config.head_sync == "broadcast" and drawn:
            heads = self._dispatcher.call_each("head_state")
            self._fleet.head = heads[min(heads)]
            births.update(self._dispatcher.call_each("take_head", self._fleet.head))

    @property
    def actors(self) -> list[ActorHandle[Any]]:
        """Handles of the live actors; each has `score_batch(batch) -> rewards`."""
        self._check_open()
        return [self._fleet.handles[actor] for actor in self._dispatcher.actors]

    @property
    def fingerprint(self) -> Fingerprint:
        """What every actor of the pool holds."""
        return self._admission.reference

    def verify(self) -> DeterminismReport:
        """Hashes what every actor holds now and compares it with what the pool began with.

        An actor that holds something else is taken out of work and replaced.

        Returns:
            The report, which prints as a table.

        Raises:
            DeterminismError: Some actors hold another model; the message names them.
        """
        accept = self._pool_config.mixed_hardware == "accept"
        with self._working():
            report = self._admission.report(self._dispatcher.call_each("fingerprint"))
            try:
                report.raise_if_different(accept_hardware=accept)
            except DeterminismError as error:
                for difference in report.differences:
                    if difference.model or (difference.computed and not accept):
                        self._dispatcher.quarantine(difference.actor, error)
                raise
        return report

    def score(self, batch: Iterable[Any]) -> NDArray[np.float32]:
        """Scores a batch in memory.

        Args:
            batch: Texts, records such as `{"prompt": …, "completion": …}`, or conversations
                (lists of messages), also mixed.

        Returns:
            `(N,)` float32 in the batch's order. NaN where a row can't be scored, with a warning in
            the log; `score_table` says of each one why.

        Raises:
            DataError: An item is none of these.
        """
        rewards = self._score_groups([[item] for item in batch])
        return np.concatenate(rewards) if rewards else np.empty(0, dtype=np.float32)

    async def score_async(self, batch: Iterable[Any]) -> NDArray[np.float32]:
        """Like `score`, without blocking the event loop."""
        return await asyncio.to_thread(self.score, list(batch))

    def score_completions(
        self, prompts: Sequence[Any], completions: Sequence[Sequence[Any]]
    ) -> list[NDArray[np.float32]]:
        """Scores several completions of each prompt.

        Args:
            prompts: N prompts, each a text or a list of messages.
            completions: N lists of completions, each a text or a list of messages. The lists may
                have different lengths.

        Returns:
            N arrays, the i-th of shape `(K_i,)`. NaN where a completion can't be scored.

        Raises:
            DataError: There are not as many lists as prompts.
        """
        if len(prompts) != len(completions):
            raise DataError(
                f"{len(prompts)} prompts but {len(completions)} lists of completions: pass one "
                "list for each prompt."
            )
        return self._score_groups(
            [
                [{"prompt": prompt, "completion": completion} for completion in group]
                for prompt, group in zip(prompts, completions, strict=True)
            ]
        )

    def score_table(self, table: pa.Table) -> pa.Table:
        """Scores an Arrow table of any row format.

        Returns:
            The table with the reward and audit columns added (`rayreward.columns`).

        Raises:
            DataError: The columns are of no known row format, or already named like the added ones.
        """
        row_format = check_schema(table.schema)
        check_free(table.schema, row_format.kind)
        read = _sendable(table.select(list(row_format.read)))
        slices = (
            read.slice(start, SLICE_ROWS) for start in range(0, max(len(read), 1), SLICE_ROWS)
        )
        added = pa.concat_tables(self._map("score_table", ((rows, row_format) for rows in slices)))
        for field, column in zip(added.schema, added.columns, strict=True):
            table = table.append_column(field, column)
        return table

    def score_dataset(
        self, dataset: str | os.PathLike[str], output: str | os.PathLike[str], **settings: Any
    ) -> JobReport:
        """Scores the files of a dataset into a directory of Parquet files.

        The same call again takes up an unfinished run where it ended.

        Args:
            dataset: As in `JobConfig`.
            output: As in `JobConfig`.
            **settings: The other fields of `JobConfig`.

        Raises:
            DataError: The dataset can't be read or understood; nothing is written.
            OutputError: The output directory belongs to another run, or can't be written.
        """
        settings = {"progress": "none", **settings}
        job = JobConfig(dataset=os.fspath(dataset), output=os.fspath(output), **settings)
        return self.run_job(prepare_job(job, self.model_config))

    def run_job(self, job: PreparedJob) -> JobReport:
        """Runs a job from `rayreward.job.prepare_job`."""
        with self._working():
            pool = self._pool_config
            return run_job(
                job,
                self._dispatcher,
                self.fingerprint,
                prove=pool.recheck_share > 0,
                max_attempts=pool.max_attempts,
            )

    def close(self) -> None:
        """Ends the actors, and Ray if the pool started it. Safe to call again."""
        self._closed = True
        if hasattr(self, "_dispatcher"):
            self._dispatcher.stop()
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _score_groups(self, groups: list[list[Any]]) -> list[NDArray[np.float32]]:
        """Scores groups of items that may begin alike; an array for each."""
        results = self._map("score_groups", ((part,) for part in _slices(groups)))
        outcomes = [group for result in results for group in result]
        _warn_of_failures([outcome for group in outcomes for outcome in group])
        return [np.array([reward_or_nan(o) for o in group], np.float32) for group in outcomes]

    def _map(self, method: str, calls: Iterable[tuple[Any, ...]]) -> list[Any]:
        """Calls an actor method for each tuple of arguments; results in the order of the calls."""
        with self._working():
            tasks = (Task(key, f"Slice {key}", method, args) for key, args in enumerate(calls))
            # what is void comes again, and the later value stands
            results = {result.task.key: result.value for result in self._dispatcher.run(tasks)}
        return [results[key] for key in range(len(results))]

    def _working(self) -> threading.RLock:
        self._check_open()
        return self._lock

    def _check_open(self) -> None:
        if self._closed:
            raise PoolClosedError("The pool is closed. Open a new RewardPool.")


def _fields_of(config: type, settings: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(config)}
    return {key: value for key, value in settings.items() if key in names}


def _slices(groups: list[list[Any]]) -> Iterator[list[list[Any]]]:
    """Cuts groups into slices of at least `SLICE_ROWS` items, except for the last."""
    start, items = 0, 0
    for index, group in enumerate(groups):
        items += len(group)
        if items >= SLICE_ROWS:
            yield groups[start : index + 1]
            start, items = index + 1, 0
    if start < len(groups):
        yield groups[start:]


def _warn_of_failures(outcomes: list[Outcome]) -> None:
    failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    if failures:
        _logger.warning(
            "%d of %d rewards are NaN; the first because: %s (%s)",
            len(failures),
            len(outcomes),
            failures[0].detail,
            failures[0].status,
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
