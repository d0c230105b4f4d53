"""A scoring job: plan, dispatch, commit, manifest.

`prepare_job` finds everything wrong with input and output before an actor is started or a byte is
written; `run_job` does the work. Does not know command lines, or how actors come to be.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray

from rayreward import storage
from rayreward._version import __version__
from rayreward.actor import ShardContext
from rayreward.config import JobConfig, ModelConfig
from rayreward.dispatch import Dispatcher
from rayreward.errors import DataError, OutputError, PoolError
from rayreward.events import Task
from rayreward.fingerprint import Fingerprint
from rayreward.isolation import TRY, Isolation
from rayreward.meter import ModelTime
from rayreward.progress import Progress
from rayreward.report import JobReport
from rayreward.shards import Plan, Shard, plan_dataset
from rayreward.types import Attempt, Tally
from rayreward.writing import OutputDirectory

_FORMAT_VERSION = 2

_ROWS_THAT_TELL = 1_000
"""With fewer, a share of them says little."""


@dataclass(frozen=True, slots=True)
class PreparedJob:
    """A job whose input has been planned and whose output has been checked."""

    config: JobConfig
    model: ModelConfig
    plan: Plan
    output: OutputDirectory
    found: dict[str, Any] | None
    """The plan that an earlier run left in the output directory."""

    @property
    def record(self) -> dict[str, Any]:
        """What makes this run this run, as plain values."""
        return {
            "version": _FORMAT_VERSION,
            "files": [asdict(file) for file in self.plan.files],
            "columns": [f"{field.name}: {field.type}" for field in self.plan.schema],
            "rows": self.plan.rows,
            "rows_per_shard": self.plan.rows_per_shard,
            "settings": asdict(self.model),
        }


def prepare_job(config: JobConfig, model: ModelConfig) -> PreparedJob:
    """Plans the input and checks the output. Writes nothing.

    Raises:
        DataError: The dataset can't be read or understood.
        OutputError: The output directory belongs to another run, or overlaps the input.
    """
    config = replace(
        config, dataset=storage.plain(config.dataset), output=storage.plain(config.output)
    )
    plan = plan_dataset(config.dataset, config.rows_per_shard)
    _check_place(config, plan)
    output = OutputDirectory(config.output)
    found = output.existing_plan()
    job = PreparedJob(config, model, plan, output, found)
    if found is not None and not config.restart:
        _check_same_run(output, found, job.record)
    return job


def run_job(
    job: PreparedJob,
    dispatcher: Dispatcher,
    fingerprint: Fingerprint,
    *,
    prove: bool,
    max_attempts: int,
) -> JobReport:
    """Scores what is not scored yet, commits it part by part, and finishes the output.

    Args:
        job: From `prepare_job`.
        dispatcher: With its actors up and checked.
        fingerprint: What all of them hold.
        prove: Whether an attempt becomes a part only once its actor was found sound after it.
        max_attempts: Actors that may die over a shard before it is halved to find the row.

    Raises:
        PoolError: Too many rows have no reward, or too many actors die, for it to be the rows.
        DataError: The input has changed since it was planned, or the model can't take its rows.
        OutputError: The output can't be written, or belongs to another run.
    """
    if job.plan.conversational and fingerprint.chat_template is None:
        raise DataError(
            f"The rows of {job.config.dataset!r} are conversations, but the tokenizer of "
            f"{job.model.model!r} has no chat template. Set tokenizer.chat_template and save it "
            "with the checkpoint, or pass plain text."
        )
    _open_output(job, fingerprint)
    provenance = make_provenance(job.model, fingerprint)
    before = sum((part.tally for part in job.output.parts), Tally())
    started, start = time.time(), time.monotonic()
    time_spent = _score_missing(job, dispatcher, provenance, before, prove, max_attempts)
    report = JobReport(
        output=str(job.output.path),
        tally=sum((part.tally for part in job.output.parts), Tally()),
        provenance=provenance,
        actors=len(dispatcher.actors),
        quarantined=tuple(dispatcher.quarantined),
        elapsed_s=time.monotonic() - start,
        rows_before=before.rows,
        tokens_before=before.tokens,
        max_failed_rows=job.config.max_failed_rows,
        busy_share=time_spent.busy_share(len(dispatcher.actors)),
    )
    if not job.output.finished:
        threads = max(birth.threads for birth in dispatcher.births.values())
        job.output.finish(_manifest(job, report, started, threads))
    return report


def make_provenance(model: ModelConfig, fingerprint: Fingerprint) -> dict[str, Any]:
    """What the parts say of their making: only what decides their bytes, so no times or hosts."""
    return {
        "rayreward": __version__,
        "model": model.model,
        "settings": asdict(model),
        "fingerprint": fingerprint.to_dict(),
    }


def _check_place(config: JobConfig, plan: Plan) -> None:
    """Refuses an output that overlaps the input, or that would vanish with a Ray job."""
    if config.output.startswith(tuple(f"{scheme}://" for scheme in storage.READ_ONLY)):
        raise OutputError(
            f"Output {config.output!r} is a place to read from. Pass a directory, or a prefix of "
            "an object store (s3://, gs://)."
        )
    written = Path(config.output).expanduser()
    relative = not storage.is_url(config.output) and not written.is_absolute()
    if relative and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise OutputError(
            f"Output {config.output!r} is a relative path, and inside a Ray job the working "
            "directory is a copy that is thrown away. Pass an absolute path that every machine "
            "of the cluster sees."
        )
    output = str(storage.locate(config.output))
    for file in plan.files:
        if storage.lies_in(file.path, output):
            raise OutputError(
                f"Input {file.path} lies inside the output directory {output}. Choose another "
                "output."
            )
    source = str(storage.locate(config.dataset.split("**")[0]))
    is_file = any(file.path == source for file in plan.files)
    if not is_file and storage.lies_in(output, source):
        raise OutputError(
            f"Output {output} lies inside the input directory {source}, so the next run "
            "would read it as input. Choose an output beside it."
        )


def _check_same_run(output: OutputDirectory, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    changed = list(_changes(found, wanted))
    if changed:
        shown = "; ".join(changed[:3]) + ("; …" if len(changed) > 3 else "")
        raise OutputError(
            f"Output {output.path} belongs to another run: {shown}. Choose another output, or "
            "start over there with restart=True (--restart)."
        )


def _changes(found: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    """What differs between the plan that lies there and the one that is wanted."""
    for name, value in wanted.items():
        old = found.get(name)
        if old == value:
            continue
        if isinstance(value, dict) and isinstance(old, dict):
            yield from _changes(old, value)
        elif name == "files":
            yield "its input files are others, or have changed"
        else:
            yield f"{name} was {old!r} and is {value!r}"


def _open_output(job: PreparedJob, fingerprint: Fingerprint) -> None:
    record = {**job.record, "fingerprint": fingerprint.to_dict()}
    if job.found is not None and not job.config.restart:
        _check_same_run(job.output, job.found, record)
        job.output.resume(len(job.plan.shards))
        return
    if job.found is not None:
        job.output.clear()
    job.output.create(record)


def _score_missing(
    job: PreparedJob,
    dispatcher: Dispatcher,
    provenance: dict[str, Any],
    before: Tally,
    prove: bool,
    max_attempts: int,
) -> ModelTime:
    done = {part.shard for part in job.output.parts}
    missing = [shard for shard in job.plan.shards if shard.index not in done]
    context = ShardContext(
        schema=job.plan.schema,
        row_format=job.plan.row_format,
        provenance=provenance,
        attempts=job.output.for_actors,
        access=storage.access(job.config.dataset, job.config.output),
    )
    shared = ray.put(context)

    def task(shard: Shard, *poison: Sequence[int]) -> Task:
        name = f"Shard {shard.index} of {shard.source}"
        return Task(
            (shard.index, *map(tuple, poison)), name, "score_shard", (shard, shared, *poison)
        )

    isolation = Isolation(
        max_attempts,
        rows_of=lambda whole: whole.args[0].rows,
        without=lambda whole, poison: task(whole.args[0], poison),
    )
    backlog = _Backlog(map(task, missing))
    time_spent, tally = ModelTime(), before
    progress = Progress(job.plan.rows, before.rows, style=job.config.progress)
    try:
        for result in dispatcher.run(backlog, prove=prove, remedy=isolation.after_death):
            if result.task.method == TRY:
                backlog.extend(isolation.after_success(result.task))
                continue
            attempt: Attempt = result.value
            if result.proven is None:
                time_spent += attempt.time_spent
                progress.add(attempt.tally.rows, attempt.tally.tokens)
            if result.proven is False:
                progress.add(-attempt.tally.rows, -attempt.tally.tokens)
                job.output.discard(attempt)
            elif (result.proven or not prove) and job.output.promote(attempt):
                tally += attempt.tally
                _check_failed_share(job.config, tally)
    finally:
        progress.close()
    return time_spent


class _Backlog(Iterator[Task]):
    """Tasks, to which others may be added even after it had no more."""

    def __init__(self, tasks: Iterator[Task]) -> None:
        self._tasks = tasks
        self._added: deque[Task] = deque()

    def extend(self, tasks: Iterable[Task]) -> None:
        self._added.extend(tasks)

    def __next__(self) -> Task:
        return self._added.popleft() if self._added else next(self._tasks)


def _check_failed_share(config: JobConfig, tally: Tally) -> None:
    """Stops a job whose rows get no rewards, before it has gone through all of them."""
    if tally.rows < _ROWS_THAT_TELL or tally.failed_rows <= config.max_failed_share * tally.rows:
        return
    reasons = ", ".join(f"{count} {status}" for status, count in tally.failed.items())
    raise PoolError(
        f"{tally.failed_rows} of the first {tally.rows} rows have no reward ({reasons}): more than "
        f"max_failed_share={config.max_failed_share:g} allows, so something else is wrong. "
        f"reward_detail in {config.output} says of each row what. Mend that, or go on with a "
        "higher --max-failed-share; what is committed stays."
    )


def _manifest(job: PreparedJob, report: JobReport, started: float, threads: int) -> dict[str, Any]:
    return {
        "version": _FORMAT_VERSION,
        "provenance": dict(report.provenance),
        "input": [asdict(file) for file in job.plan.files],
        "rows": report.tally.rows,
        "tally": asdict(report.tally),
        "accuracy": report.accuracy,
        "mean_margin": report.mean_margin,
        "actors": report.actors,
        "threads": threads,
        "quarantined": list(report.quarantined),
        "started_unix_s": started,
        "elapsed_s": report.elapsed_s,
        "busy_share": report.busy_share,
        "parts": [
            {
                "name": part.name,
                "rows": part.tally.rows,
                "size_bytes": part.size_bytes,
                "sha256": part.sha256,
            }
            for part in job.output.parts
        ],
    }
