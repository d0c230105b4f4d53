"""`RewardPool`: reward models on a Ray cluster behind one object."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayreward.actor import reward_or_nan
from rayreward.columns import check_free
from rayreward.config import JobConfig, ModelConfig, PoolConfig, SharingConfig, path_of
from rayreward.determinism import DeterminismReport
from rayreward.errors import DataError, PoolError
from rayreward.fingerprint import Fingerprint
from rayreward.items import as_batch, to_sample, to_samples, to_table
from rayreward.job import PreparedJob, prepare_job
from rayreward.keeper import Status
from rayreward.local import LocalEngine
from rayreward.preferences import check_schema
from rayreward.remote import RemoteEngine
from rayreward.report import JobReport
from rayreward.types import Failure, Outcome, Version

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.util.placement_group import PlacementGroup

_logger = logging.getLogger("rayreward")


@dataclasses.dataclass(frozen=True, slots=True)
class AuditedRewards:
    """Rewards with what they come from.

    Attributes:
        outcomes: For each item of the batch its reward, with tokens, or why it has none.
        version: Which weights all of them come from.
    """

    outcomes: Sequence[Outcome]
    version: Version

    @property
    def rewards(self) -> NDArray[np.float32]:
        """`(N,)` float32; NaN where there is none."""
        return np.array([reward_or_nan(outcome) for outcome in self.outcomes], dtype=np.float32)

    def checked_rewards(self) -> NDArray[np.float32]:
        """As `rewards`, with a warning in the log where there is a NaN."""
        _warn_of_failures(self.outcomes)
        return self.rewards


class RewardPool:
    """Reward models on a Ray cluster, loaded alike, checked to be alike, and kept alive.

    Use it as a context manager, or call `close()`:

        with RewardPool("path/or/hub-id", seed=42) as pool:
            rewards = pool.score(["What is 2 + 2? It is 4.", "What is 2 + 2? It is 5."])

    The pool starts Ray, and ends it, only where Ray is not running yet. Its methods may be called
    from several threads. Calls are served one after the other, or, by a pool with a name, together.

    A pool with a name is found again from any driver, task or actor of the Ray cluster, and may be
    sent to one:

        RewardPool("path/or/hub-id", seed=42, name="rm", lifetime="detached")
        rewards = RewardPool.connect("rm").score(["…"])
    """

    _engine: LocalEngine | RemoteEngine

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
        torch_compile: bool | Literal["auto"] = "auto",
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
        label_selector: Mapping[str, str] | None = None,
        name: str | None = None,
        lifetime: Literal["detached"] | None = None,
        max_wait_ms: float = 5.0,
        max_queued_rows: int = 8_192,
        placement_group: PlacementGroup | None = None,
    ) -> None:
        """Starts the actors and checks that they hold the same model.

        The arguments are the fields of `ModelConfig`, `PoolConfig` and `SharingConfig`
        (`rayreward.config`), which describe them. In a `placement_group`, reserved by the caller,
        the actors live, one a bundle where num_actors is "auto".

        Raises:
            ConfigError: A setting is out of range.
            ModelError: The checkpoint can't be loaded as a reward model.
            PlacementError: The cluster has no room for a single actor.
            DeterminismError: The actors hold different models.
            PoolError: There is a pool of that name already.
        """
        settings = {key: value for key, value in locals().items() if key not in ("self", "model")}
        self._start(
            ModelConfig(model=path_of(model), **_fields_of(ModelConfig, settings)),
            PoolConfig(**_fields_of(PoolConfig, settings)),
            SharingConfig(**_fields_of(SharingConfig, settings)),
            placement_group,
        )

    @classmethod
    def from_config(
        cls,
        model: ModelConfig,
        pool: PoolConfig | None = None,
        sharing: SharingConfig | None = None,
    ) -> Self:
        """Like the constructor, from configs."""
        self = cls.__new__(cls)
        self._start(model, pool or PoolConfig(), sharing or SharingConfig(), None)
        return self

    @classmethod
    def connect(cls, name: str, *, ray_address: str | None = None, timeout_s: float = 0.0) -> Self:
        """Finds a pool that was opened with a name, from anywhere in its Ray cluster.

        Args:
            name: Of the pool.
            ray_address: Of the cluster. Null: the one that this process is part of, or RAY_ADDRESS,
                or the one on this machine.
            timeout_s: How long to wait for a pool of that name to come.

        Raises:
            PoolError: There is none.
        """
        self = cls._named(name, ray_address, timeout_s)
        self._remote("connect").connect()
        return self

    @classmethod
    def _named(cls, name: str, ray_address: str | None = None, timeout_s: float = 0.0) -> Self:
        self = cls.__new__(cls)
        self._engine = RemoteEngine(name, ray_address, timeout_s)
        return self

    def _start(
        self,
        model: ModelConfig,
        pool: PoolConfig,
        sharing: SharingConfig,
        placement_group: PlacementGroup | None,
    ) -> None:
        if sharing.name is None:
            self._engine = LocalEngine(model, pool, placement_group)
        else:
            self._engine = RemoteEngine.create(sharing.name, model, pool, sharing, placement_group)

    @property
    def actors(self) -> list[ActorHandle[Any]]:
        """Handles of the live actors; each has `score_batch(batch) -> rewards`."""
        return self._engine.actors

    @property
    def fingerprint(self) -> Fingerprint:
        """What every actor of the pool holds."""
        return self._engine.fingerprint

    @property
    def version(self) -> Version:
        """Which weights the pool scores with now."""
        return self._engine.version

    @property
    def model_config(self) -> ModelConfig:
        """What every actor of the pool holds, as settings."""
        return self._engine.model

    @property
    def name(self) -> str | None:
        """By which others find the pool; null if they can't."""
        return self._engine.name if isinstance(self._engine, RemoteEngine) else None

    @property
    def status(self) -> Status:
        """How a pool with a name is doing.

        Raises:
            PoolError: It has none.
        """
        return self._remote("status").status

    async def status_async(self, *, timeout_s: float | None = None) -> Status:
        """Like `status`, without blocking the event loop.

        Raises:
            PoolError: The pool has no name.
            PoolTimeoutError: It did not tell in time.
        """
        return await self._remote("status_async").status_async(timeout_s)

    def verify(self) -> DeterminismReport:
        """Hashes what every actor holds now and compares it with what the pool began with.

        An actor that holds something else is taken out of work and replaced.

        Returns:
            The report, which prints as a table.

        Raises:
            DeterminismError: Some actors hold another model; the message names them.
        """
        return self._engine.verify()

    def update(self, checkpoint: str | os.PathLike[str], *, revision: str | None = None) -> Version:
        """Scores with other weights from now on.

        Every actor loads the checkpoint beside what it holds, and goes on scoring meanwhile; what
        they hold then is compared; then all change over at once. Whatever is asked in one call is
        scored with one version. If anything fails, the old one goes on.

        Args:
            checkpoint: Directory, as every machine sees it, or a model id on the hub. The other
                settings, such as the seed, stay.
            revision: Of a hub model.

        Returns:
            The version that is scored with from now on.

        Raises:
            ConfigError: It is no path, such as a model in memory.
            ModelError: The checkpoint can't be loaded as a reward model.
            DeterminismError: The actors hold different models.
            PoolError: Another update is under way, or no actor is left.
        """
        model = ModelConfig(model=path_of(checkpoint)).model
        return self._engine.update(model, revision)

    def score(self, batch: Iterable[Any], *, timeout_s: float | None = None) -> NDArray[np.float32]:
        """Scores a batch in memory.

        Args:
            batch: Texts, records such as `{"prompt": …, "completion": …}`, conversations (lists of
                messages), or samples of `rayreward.types` such as `Verbatim`, also mixed. What
                begins alike is computed once.
            timeout_s: How long to wait for the rewards. Null: as long as it takes.

        Returns:
            `(N,)` float32 in the batch's order. NaN where a row can't be scored, with a warning in
            the log; `score_table` and `score_audited` say of each one why.

        Raises:
            DataError: It is one item and no batch, or an item is none of these.
            PoolTimeoutError: They were not there in time.
        """
        return self.score_audited(batch, timeout_s=timeout_s).checked_rewards()

    async def score_async(
        self, batch: Iterable[Any], *, timeout_s: float | None = None
    ) -> NDArray[np.float32]:
        """Like `score`, without blocking the event loop.

        Where it is cancelled, a pool with a name drops what was asked.
        """
        audited = await self.score_audited_async(batch, timeout_s=timeout_s)
        return audited.checked_rewards()

    def score_audited(
        self, batch: Iterable[Any], *, timeout_s: float | None = None
    ) -> AuditedRewards:
        """Like `score`; says of each reward what it comes from, or why there is none."""
        groups = [[sample] for sample in to_samples(batch)]
        outcomes, version = self._engine.score_groups(groups, timeout_s)
        return AuditedRewards([group[0] for group in outcomes], version)

    async def score_audited_async(
        self, batch: Iterable[Any], *, timeout_s: float | None = None, patient: bool = True
    ) -> AuditedRewards:
        """Like `score_audited`, without blocking the event loop.

        Args:
            batch: As there.
            timeout_s: As there.
            patient: Whether to try again while a pool with a name is busy.

        Raises:
            DataError: It is one item and no batch, or an item is none of these.
            PoolTimeoutError: They were not there in time.
            PoolBusyError: Too much waits in the pool already, and `patient` is false.
        """
        if isinstance(self._engine, LocalEngine):
            return await asyncio.to_thread(
                self.score_audited, list(as_batch(batch)), timeout_s=timeout_s
            )
        groups = [[sample] for sample in to_samples(batch)]
        outcomes, version = await self._engine.score_groups_async(
            groups, timeout_s, patient=patient
        )
        return AuditedRewards([group[0] for group in outcomes], version)

    def score_completions(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Sequence[Any]],
        *,
        timeout_s: float | None = None,
    ) -> list[NDArray[np.float32]]:
        """Scores several completions of each prompt.

        Args:
            prompts: N prompts, each a text or a list of messages.
            completions: N lists of completions, each a text or a list of messages. The lists may
                have different lengths.
            timeout_s: How long to wait for the rewards. Null: as long as it takes.

        Returns:
            N arrays, the i-th of shape `(K_i,)`. NaN where a completion can't be scored.

        Raises:
            DataError: There are not as many lists as prompts, or one is no list.
            PoolTimeoutError: The rewards were not there in time.
        """
        if len(prompts) != len(completions):
            raise DataError(
                f"{len(prompts)} prompts but {len(completions)} lists of completions: pass one "
                "list for each prompt."
            )
        groups = [
            [to_sample({"prompt": prompt, "completion": one}) for one in as_batch(group)]
            for prompt, group in zip(as_batch(prompts), as_batch(completions), strict=True)
        ]
        outcomes, version = self._engine.score_groups(groups, timeout_s)
        _warn_of_failures([outcome for group in outcomes for outcome in group])
        return [AuditedRewards(group, version).rewards for group in outcomes]

    def score_table(self, table: Any, *, timeout_s: float | None = None) -> pa.Table:
        """Scores a table of any row format.

        Args:
            table: The rows: an Arrow table or record batch, a data frame of pandas or polars, or a
                `datasets.Dataset`.
            timeout_s: How long to wait for the rewards. Null: as long as it takes.

        Returns:
            An Arrow table with the reward and audit columns added (`rayreward.columns`).

        Raises:
            DataError: It is no table, its columns are of no known row format, or already named like
                the added ones.
            PoolTimeoutError: The rewards were not there in time.
        """
        table = to_table(table)
        row_format = check_schema(table.schema)
        check_free(table.schema, row_format.kind)
        read = table.select(list(row_format.read))
        added = self._engine.score_table(read, row_format, timeout_s)
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
        self._engine_of_its_own()
        settings = {"progress": "none", **settings}
        job = JobConfig(dataset=path_of(dataset), output=path_of(output), **settings)
        return self.run_job(prepare_job(job, self.model_config))

    def run_job(self, job: PreparedJob) -> JobReport:
        """Runs a job from `rayreward.job.prepare_job`.

        Raises:
            PoolError: The pool has a name: others use it, and a job needs actors of its own.
        """
        return self._engine_of_its_own().run_job(job)

    def close(self) -> None:
        """Ends the actors, and Ray if the pool started it. Safe to call again.

        A pool that was connected to, or opened with lifetime="detached", lives on: see `shut_down`.
        """
        self._engine.close()

    def shut_down(self, *, timeout_s: float = 30.0) -> None:
        """Ends a pool with a name for everybody.

        Args:
            timeout_s: How long to go on answering what has been asked.
        """
        self._remote("shut_down").shut_down(timeout_s)
        self.close()

    def _engine_of_its_own(self) -> LocalEngine:
        if isinstance(self._engine, LocalEngine):
            return self._engine
        raise PoolError(
            f"The pool {self.name!r} is shared, and a job needs actors of its own: it commits what "
            "they write, and proves it. Open a RewardPool without a name for it."
        )

    def _remote(self, what: str) -> RemoteEngine:
        if isinstance(self._engine, RemoteEngine):
            return self._engine
        raise PoolError(f"{what} is for pools with a name; this one has none.")

    def __reduce__(self) -> tuple[Any, ...]:
        if self.name is None:
            raise PoolError(
                "A pool without a name can't be sent to another process: it lives in this one. "
                "Open it with RewardPool(…, name='rm'), which can be."
            )
        return RewardPool._named, (self.name,)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _fields_of(config: type, settings: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(config)}
    return {key: value for key, value in settings.items() if key in names}


def _warn_of_failures(outcomes: Sequence[Outcome]) -> None:
    failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    if failures:
        _logger.warning(
            "%d of %d rewards are NaN; the first because: %s (%s)",
            len(failures),
            len(outcomes),
            failures[0].detail,
            failures[0].status,
        )
