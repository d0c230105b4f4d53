"""Ray Data: scoring as a step of a pipeline, by workers that check what they hold.

    settings = {"model": "/data/model", "seed": 42}
    expect = find_fingerprint(**settings, num_cpus=2)
    scored = ray.data.read_parquet("/data/prefs").map_batches(
        RewardScorer,
        fn_constructor_kwargs={**settings, "expect": expect},
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=4),
        num_cpus=2,
    )

Ray Data cuts the batches and owns the workers: G1 is checked as each of them loads, G3 holds as
everywhere, and there are no parts, proofs while working or resumes, as a job has them. Does not
know files, or how Ray Data plans its work.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

import pyarrow as pa
import ray
from ray.exceptions import RayTaskError

from rayreward.actor import RewardActor
from rayreward.columns import check_free
from rayreward.config import ModelConfig, path_of
from rayreward.determinism import compare
from rayreward.errors import ConfigError, DataError, DeterminismError
from rayreward.fingerprint import Fingerprint
from rayreward.preferences import RowFormat, check_schema, is_list_of


class RewardScorer:
    """Adds the reward and audit columns to batches: a callable class for `Dataset.map_batches`.

    Pass `batch_format="pyarrow"`. Each worker computes with as many threads as it reserves CPUs
    (`num_cpus`), and on a GPU only if it reserves one (`num_gpus`), as a pool's actors do. Leave a
    CPU of the cluster free to read with: workers that reserve all of them wait for rows for ever
    (seen with Ray 2.60).

    Where G3 holds, rewards are those of a `RewardPool` with the same settings, bit for bit,
    whatever the batch size and the number of workers; `batch_invariant=True` insists on it.

    An error in a worker ends the execution; Ray Data wraps it, with its text, in an error of its
    own.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        expect: Fingerprint | Mapping[str, Any] | None = None,
        mixed_hardware: Literal["refuse", "accept"] = "refuse",
        **settings: Any,
    ) -> None:
        """Loads the model, and compares it with what is expected before it scores anything.

        Args:
            model: Checkpoint directory, as every machine sees it, or a model id on the hub.
            expect: What every worker must hold: a fingerprint from `find_fingerprint`,
                `RewardPool.fingerprint`, `rayreward fingerprint`, or an output's manifest. None:
                nothing is compared, and nothing is promised of the workers.
            mixed_hardware: What happens where a worker holds that model but computes other bits
                with it. "refuse": an error. "accept": the last bits of a reward depend on who
                scored it.
            **settings: The other fields of `ModelConfig` (`rayreward.config`), such as `seed`.

        Raises:
            ConfigError: A setting is out of range, or `expect` is no fingerprint.
            ModelError: The checkpoint can't be loaded as a reward model.
            DeterminismError: This worker does not hold what is expected; the message names what
                differs.
        """
        if mixed_hardware not in ("refuse", "accept"):
            raise ConfigError(f"mixed_hardware={mixed_hardware!r} must be 'refuse' or 'accept'.")
        config = ModelConfig(model=path_of(model), **settings)
        expected = _read_fingerprint(expect)
        self._actor = _new_actor(config)
        held = self._actor.load().fingerprint
        if expected is not None:
            _check(held, expected, accept_hardware=mixed_hardware == "accept")

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Scores a batch.

        Args:
            batch: N rows of any row format (`rayreward.preferences`).

        Returns:
            The same N rows with the columns that a job adds (`rayreward.columns`). A reward that
            could not be computed is null; `reward_status` and `reward_detail` say why.

        Raises:
            DataError: It is no Arrow table, or its columns are of no known row format, or already
                named like the added ones.
        """
        if not isinstance(batch, pa.Table):
            raise DataError(
                f"Expected batches as Arrow tables, and got a {type(batch).__name__}. Say "
                'batch_format="pyarrow" in map_batches.'
            )
        row_format = _row_format(batch.schema)
        check_free(batch.schema, row_format.kind)
        added = self._actor.work("score_table", batch, row_format).value
        schema = pa.schema([*batch.schema, *added.schema])
        return pa.table([*batch.columns, *added.columns], schema=schema)


def find_fingerprint(
    model: str | os.PathLike[str], *, num_cpus: float = 1, num_gpus: float = 0, **settings: Any
) -> Fingerprint:
    """Loads the model once, in a Ray task, and says what it holds: what to `expect` of workers.

    Args:
        model: As for `RewardScorer`.
        num_cpus: As for `map_batches`, so that it is computed as the workers do.
        num_gpus: As for `map_batches`.
        **settings: As for `RewardScorer`.

    Raises:
        ConfigError: A setting is out of range.
        ModelError: The checkpoint can't be loaded as a reward model.
    """
    config = ModelConfig(model=path_of(model), **settings)
    # the process ends with the task: threads and devices were set in it for good
    load: Any = ray.remote(max_calls=1)(_load_fingerprint)
    try:
        found: Fingerprint = ray.get(
            load.options(num_cpus=num_cpus, num_gpus=num_gpus).remote(config)
        )
    except RayTaskError as error:
        raise error.cause from None
    return found


def _load_fingerprint(config: ModelConfig) -> Fingerprint:
    return _new_actor(config).load().fingerprint


def _new_actor(config: ModelConfig) -> RewardActor:
    """A pool's actor, in this process, with the threads and the device that Ray reserved for it."""
    reserved = ray.get_runtime_context().get_assigned_resources()
    threads = max(1, int(reserved.get("CPU", 1)))
    on_gpu = reserved.get("GPU", 0) > 0
    return RewardActor(config, threads, on_gpu, recheck_share=0, one_thread=False)


def _read_fingerprint(expect: Fingerprint | Mapping[str, Any] | None) -> Fingerprint | None:
    if expect is None or isinstance(expect, Fingerprint):
        return expect
    try:
        return Fingerprint.from_dict(dict(expect))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"expect={expect!r} is no fingerprint ({error!r}). Pass what find_fingerprint or "
            "RewardPool.fingerprint gives, or what `rayreward fingerprint` prints."
        ) from error


def _check(held: Fingerprint, expected: Fingerprint, *, accept_hardware: bool) -> None:
    """Refuses a worker that does not hold, or compute, what is expected."""
    report = compare({0: held}, expected)
    if report.other_models:
        raise DeterminismError(
            "This worker holds another model than expected, so the same text would get another "
            f"reward: {report.differences[0]}. Check that the settings are those of the "
            "fingerprint and that every machine has the same files and packages; where they are "
            "alike, suspect memory or disk.",
            report,
        )
    if report.other_hardware and not accept_hardware:
        raise DeterminismError(
            "This worker holds the model that is expected and computes other bits with it: "
            f"{report.differences[0]}. Use machines that are alike, call find_fingerprint with the "
            "num_cpus and num_gpus of the workers, or accept with mixed_hardware='accept' that the "
            "last bits of a reward depend on who computes it.",
            report,
        )


_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_HOLDS = {"completions": pa.list_(pa.string()), "messages": _MESSAGES}
"""What a column holds, if not text."""


def _row_format(schema: pa.Schema) -> RowFormat:
    """The row format of a block. A column that holds nothing in it has no type yet, and passes.

    Ray Data finds types block by block, so the column may well hold text in the next one.
    """
    return check_schema(
        pa.schema(
            [
                field.with_type(_HOLDS.get(field.name, pa.string()))
                if _holds_nothing(field.type)
                else field
                for field in schema
            ]
        )
    )


def _holds_nothing(kind: pa.DataType) -> bool:
    return pa.types.is_null(kind) or is_list_of(kind, pa.types.is_null)
