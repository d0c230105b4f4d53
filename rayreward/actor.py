"""One model as a Ray actor: `score_batch`, `score_table`, `score_shard`, `fingerprint`, `prove`.

An actor knows nothing of other actors, of plans or of the output beyond its own attempt file.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayreward import storage
from rayreward.allocator import FreedMemory
from rayreward.attempts import Attempts, output_schema
from rayreward.collector import importing
from rayreward.columns import reward_schema
from rayreward.config import ModelConfig
from rayreward.errors import DataError, PoolError
from rayreward.fingerprint import Fingerprint, Proof
from rayreward.items import to_samples, to_table
from rayreward.meter import ModelTime
from rayreward.preferences import RowFormat, RowKind, check_schema
from rayreward.reading import read_shard
from rayreward.recheck import Recheck
from rayreward.shards import Shard
from rayreward.tally import tally_columns
from rayreward.threads import wait_briefly
from rayreward.turns import OneThread, Turns
from rayreward.types import Attempt, Failure, Outcome, Reward, Sample, Status

if TYPE_CHECKING:
    from rayreward.scorer import Scorer

_logger = logging.getLogger("rayreward")

_PLANS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_PLANS_KEPT = "64"
"""Plans of oneDNN and of torch, one a shape. By default 1,024: texts of all lengths make them all,
and an actor grows all the while. Fewer cost no time that could be measured."""

_POISON = Failure(Status.POISON, "actors died over this row, again and again, and over it alone")

Batch: TypeAlias = Sequence[Any] | pa.Table | pa.RecordBatch
HeadState: TypeAlias = dict[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class ShardContext:
    """What all shards of a job have in common. Sent once, through the object store."""

    schema: pa.Schema
    row_format: RowFormat
    provenance: dict[str, Any]
    attempts: Attempts
    access: dict[str, tuple[str, str]] = field(default_factory=dict, repr=False)
    """How to reach the URLs among the names, as `rayreward.storage` keeps it."""


@dataclass(frozen=True, slots=True)
class Birth:
    """What an actor reports once its model is loaded."""

    fingerprint: Fingerprint
    node: str
    pid: int
    threads: int
    """That it computes with on a CPU."""


@dataclass(frozen=True, slots=True)
class Worked:
    """The value of a call, and what the actor held after it, where it was time to look.

    Attributes:
        value: What the method returned.
        done_s: When it did, by a clock of the actor's own.
        proof: What the actor held, or null.
        looked_s: When it looked, by the same clock: what was done by then is proven.
    """

    value: Any
    done_s: float
    proof: Proof | None = None
    looked_s: float = -math.inf


class RewardActor:
    """Holds one reward model. Made a Ray actor by `rayreward.fleet`.

    The constructor does nothing, so that an actor which has found its place can be told from one
    whose model is being loaded. Calls come on several threads: while the model works for one, the
    next one's rows are read and tokenized and the last one's file is written.
    """

    def __init__(
        self,
        config: ModelConfig,
        threads: int,
        on_gpu: bool,
        recheck_share: float,
        *,
        one_thread: bool = True,
    ) -> None:
        """
        Args:
            config: What to load.
            threads: To compute with on a CPU.
            on_gpu: Whether the model is on one.
            recheck_share: The most of the time that looks at the weights may take.
            one_thread: Whether the model runs on a thread of its own, whichever it is called from.
        """
        self._config = config
        self._threads = threads
        self._on_gpu = on_gpu
        self._recheck = Recheck(recheck_share)
        self._freed = FreedMemory()
        self._turns = OneThread() if one_thread else Turns()
        self._scorer: Scorer | None = None
        self._prepared: tuple[ModelConfig, Scorer] | None = None
        self._looking = threading.Lock()
        wait_briefly()
        # torch.compile would start a process for each core of the machine, in every actor; what it
        # compiles here is a dozen kernels
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        for plans in _PLANS:
            os.environ.setdefault(plans, _PLANS_KEPT)
        if not on_gpu:
            # Ray leaves an actor that reserved no GPU free to see them all
            os.environ["CUDA_VISIBLE_DEVICES"] = ""

    def load(self, head: HeadState | None = None) -> Birth:
        """Loads the model and says what it is.

        Args:
            head: Weights of a head to hold instead of the one that this machine draws.

        Raises:
            ModelError: The checkpoint can't be loaded as a reward model.
            ConfigError: A setting does not fit the model.
        """
        with importing():
            import rayreward.scorer  # noqa: F401

        self._freed.keep()
        self._scorer = self._turns.take(lambda: self._load(self._config, head))
        self._scorer.turns = self._turns
        return self._birth()

    def prepare(self, config: ModelConfig, head: HeadState | None = None) -> Birth:
        """Loads another model beside the one that goes on scoring, and says what it is.

        Args:
            config: What to load.
            head: As for `load`.

        Raises:
            ModelError: The checkpoint can't be loaded as a reward model.
            ConfigError: A setting does not fit the model.
            PoolError: There is no memory for both.
        """
        import torch

        self._let_go()
        try:
            apart = OneThread()
            scorer = apart.take(lambda: self._load(config, head))
            scorer.turns = apart
            birth = self._birth_of(scorer.fingerprint())
        except torch.OutOfMemoryError as error:
            raise PoolError(
                f"The device of an actor has no room for {config.model!r} beside the model that it "
                f"scores with ({error}). Open another pool for it, and end this one."
            ) from error
        self._prepared = config, scorer
        return birth

    def prepared_head(self) -> HeadState:
        """The weights by name of the head of the model that was prepared."""
        assert self._prepared is not None, "prepare() comes first"
        return self._prepared[1].head_state()

    def exchange(self) -> None:
        """Scores with the model that was prepared from now on, and lets go of the other."""
        assert self._prepared is not None, "prepare() comes first"
        self._config, self._scorer = self._prepared
        self._scorer.turns = self._turns
        self._let_go()

    def drop_prepared(self) -> None:
        """Lets go of the model that was prepared."""
        self._let_go()

    def _let_go(self) -> None:
        self._prepared = None
        gc.collect()
        if self._on_gpu:
            import torch

            torch.cuda.empty_cache()

    def _load(self, config: ModelConfig, head: HeadState | None) -> Scorer:
        import torch

        from rayreward.scorer import Scorer

        torch.set_num_threads(self._threads)  # of this thread, whatever it had
        # Ray shows a pinned actor its own GPU only, so it is 0 whatever LOCAL_RANK was inherited
        scorer = Scorer.load(config, "cuda:0" if self._on_gpu else "cpu")
        if head is not None:
            scorer.take_head(head)
        return scorer

    def fingerprint(self) -> Fingerprint:
        """Hashes the weights as they are now, scores the probe, and says where it did so."""
        return self._loaded.turns.take(self._find_fingerprint)

    def prove(self) -> Proof:
        """The part of the fingerprint that could have changed since."""
        return self._look()[0]

    def head_state(self) -> HeadState:
        """The head's weights by name."""
        return self._loaded.head_state()

    def take_head(self, head: HeadState) -> Birth:
        """Holds another actor's head from now on."""
        self._loaded.take_head(head)
        return self._birth()

    def work(self, method: str, *args: Any) -> Worked:
        """Calls one of the other methods, then looks at the weights if it is time to."""
        if method == "prove":
            proof, looked_s = self._look()
            return Worked(proof, looked_s, proof, looked_s)
        value = self._survive(getattr(self, method), *args)
        self._freed.hand_back()
        done_s = time.monotonic()
        with self._looking:  # of two that find it due, one looks
            return Worked(value, done_s, *(self._look() if self._recheck.due else ()))

    def where(self) -> str:
        """The id of the machine in the cluster."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def pulse(self) -> int:
        """Grows as the actor gets on; answered beside whatever it is doing."""
        return self._scorer.batches_done if self._scorer else 0

    def score_batch(self, batch: Batch) -> NDArray[np.float32]:
        """Scores rows that get one reward each.

        Args:
            batch: Texts, records such as `{"prompt": …, "completion": …}`, conversations, or an
                Arrow table or record batch of such rows.

        Returns:
            `(N,)` float32 in the batch's order. NaN where a row can't be scored; `score_table`
            says why.

        Raises:
            DataError: The batch is of no format with one reward a row.
        """
        if isinstance(batch, pa.Table | pa.RecordBatch):
            return self._score_single_table(to_table(batch))
        outcomes = self.score_samples([[sample] for sample in to_samples(batch)])
        return np.array([reward_or_nan(group[0]) for group in outcomes], dtype=np.float32)

    def score_groups(self, groups: Sequence[Sequence[Any]]) -> list[list[Outcome]]:
        """Scores groups of items, each as in `score_batch`, that may begin alike.

        Returns:
            For each group what became of its items, in order.
        """
        return self._loaded.score_groups([to_samples(group) for group in groups])

    def score_samples(self, groups: Sequence[Sequence[Sample]]) -> list[list[Outcome]]:
        """Scores groups of samples that may begin alike; as `score_groups`, of what it makes."""
        return self._loaded.score_groups(groups)

    def score_table(self, table: pa.Table, row_format: RowFormat | None = None) -> pa.Table:
        """Scores a table of any row format; returns the columns to add.

        Raises:
            DataError: The columns are of no known row format.
        """
        return self._loaded.score_table(table, row_format or check_schema(table.schema))

    def try_rows(self, shard: Shard, context: ShardContext, first: int, end: int) -> None:
        """Scores some rows of a shard and keeps nothing: does one of them kill the actor?"""
        storage.take_access(context.access)
        rows, lost = read_shard(shard.slice(first, end - first), context.schema)
        self._loaded.score_table(rows, context.row_format, lost=lost)

    def score_shard(
        self, shard: Shard, context: ShardContext, poison: Sequence[int] = ()
    ) -> Attempt:
        """Reads a shard, scores it, and writes an attempt file under a name of its own.

        Args:
            shard: What to read.
            context: What all shards of the job have in common.
            poison: Numbers of its rows that killed actors: they get no reward.

        Raises:
            DataError: The input has changed since it was planned, or can't be read here.
            OutputError: The attempt can't be written.
        """
        storage.take_access(context.access)
        time_spent, kind = ModelTime(), context.row_format.kind
        rows, lost = read_shard(shard, context.schema)
        lost = {**lost, **dict.fromkeys(poison, _POISON)}
        added = self._loaded.score_table(rows, context.row_format, time_spent, lost)
        schema = output_schema(context.schema, reward_schema(kind), context.provenance)
        result = pa.table([*rows.columns, *added.columns], schema=schema)
        attempt = context.attempts.write(shard.index, result, tally_columns(kind, added))
        return replace(attempt, time_spent=time_spent)

    @staticmethod
    def _survive(call: Callable[..., Any], *args: Any) -> Any:
        """Calls; where the GPU itself has failed, ends the process, which can't use it any more."""
        import torch

        try:
            return call(*args)
        except torch.AcceleratorError as error:
            _logger.error("the device failed, and this process with it: %s", error)
            os._exit(1)

    def _score_single_table(self, table: pa.Table) -> NDArray[np.float32]:
        row_format = check_schema(table.schema)
        if row_format.kind is not RowKind.SINGLE:
            raise DataError(
                f"Rows with {' and '.join(row_format.columns)} have more than one reward. Use "
                "score_table."
            )
        rewards = self._loaded.score_table(table, row_format)["reward"]
        return np.array(rewards.to_pylist(), dtype=np.float32)  # None becomes NaN

    def _look(self) -> tuple[Proof, float]:
        def look() -> tuple[Proof, float]:
            with self._recheck.look():
                looked_s = time.monotonic()
                return self._loaded.prove(), looked_s

        return self._loaded.turns.take(look)

    def _find_fingerprint(self) -> Fingerprint:
        with self._recheck.look():
            return self._loaded.fingerprint()

    def _birth(self) -> Birth:
        return self._birth_of(self.fingerprint())

    def _birth_of(self, fingerprint: Fingerprint) -> Birth:
        return Birth(fingerprint, self.where(), os.getpid(), self._threads)

    @property
    def _loaded(self) -> Scorer:
        assert self._scorer is not None, "load() comes first"
        return self._scorer


def reward_or_nan(outcome: Outcome) -> float:
    """The reward, or NaN where there is none."""
    return outcome.value if isinstance(outcome, Reward) else float("nan")
