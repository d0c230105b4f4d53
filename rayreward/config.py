"""Validated settings: what decides a reward, how the work is spread, what the job reads and writes.

The command line is generated from these classes (`rayreward.cli`): a field's name is its flag
and the text below it is its help. This module does not know where a setting is used.
"""

from __future__ import annotations

import dataclasses
import math
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rayreward.errors import ConfigError

MAX_SEED = 2**32 - 1
"""The largest seed that NumPy takes, and so the largest that `transformers.set_seed` takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Everything that decides a reward. Two equal configs on like hardware give equal bits."""

    model: str
    """Checkpoint directory, or a model id on the Hugging Face hub."""

    revision: str | None = None
    """Branch, tag or commit of a hub model. None: its main branch."""

    seed: int | None = None
    """Seed of the head, needed where the checkpoint has none. A trained head never uses it."""

    head: Literal["auto", "trained", "seeded"] = "auto"
    """What the head may be. "trained" refuses a checkpoint without one, "seeded" one with one."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the body. "auto": the checkpoint's own. The head is float32 in any case."""

    max_length: int | None = None
    """Longest text in tokens. None: as many as the model has positions for."""

    truncation: Literal["error-row", "left", "right"] = "error-row"
    """What happens to a longer text: no reward and a reason, or its start or end is cut off."""

    max_batch_tokens: int | Literal["auto"] = "auto"
    """Tokens in a batch, padding included. "auto": on a CPU 8,192, or 1,024 where batches are
    padded; on a GPU up to 16,384, as many as its free memory holds. Where max_length is left open,
    a text longer than this is a batch of its own."""

    batch_invariant: bool | Literal["auto"] = "auto"
    """Whether a reward must keep its bits whatever shares its batch. "auto": where that costs
    nothing, and it is recorded whether it held. True: always, one text at a time if need be.
    False: not tried."""

    torch_compile: bool | Literal["auto"] = "auto"
    """Fuse what a decoder does between its products: faster, and 5 to 20 seconds more to start.
    "auto": on a GPU in half precision. On a CPU it gains some 10 %, which pays for such a start
    after a minute or two of nothing but scoring."""

    share_prefixes: bool = True
    """Run what texts of a shard or a request begin with in common once, such as a system prompt or
    a prompt. Where G3 holds their rewards stay the same, bit for bit."""

    pad_token: str | None = None
    """Padding token, for a checkpoint that names none (TRL's RewardConfig has the same)."""

    def __post_init__(self) -> None:
        _check_choices(self)
        _take_path(self, "model", "pass a checkpoint directory or a hub id")
        _check(
            self.batch_invariant in (True, False, "auto"),
            f"batch_invariant={self.batch_invariant!r} must be True, False or 'auto'.",
        )
        _check(
            self.torch_compile in (True, False, "auto"),
            f"torch_compile={self.torch_compile!r} must be True, False or 'auto'.",
        )
        if self.seed is not None:
            _check_int("seed", self.seed, at_least=0, at_most=MAX_SEED)
        if self.max_length is not None:
            _check_int("max_length", self.max_length, at_least=1)
        if self.max_batch_tokens != "auto":
            _check_int("max_batch_tokens", self.max_batch_tokens, at_least=1)
            _check(
                self.max_length is None or self.max_length <= self.max_batch_tokens,
                f"max_length={self.max_length} does not fit into "
                f"max_batch_tokens={self.max_batch_tokens}: a text that long would fit no batch. "
                "Raise max_batch_tokens or lower max_length.",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolConfig:
    """How the work is spread. None of it changes a reward."""

    num_actors: int | Literal["auto"] = "auto"
    """Model replicas. "auto": one per GPU of the cluster, or without GPUs one per machine."""

    min_actors: int | None = None
    """With how many work may begin, and without how many it may not go on; the others join when
    the cluster has room. None: a job begins with the first, a pool once it is known of each
    whether there is room for it."""

    num_gpus_per_actor: float | None = None
    """GPUs that each actor reserves, at most 1. None: 1 where the cluster has GPUs, else 0."""

    num_cpus_per_actor: float | None = None
    """CPUs that each actor reserves, and its torch threads. None: an equal share of the machines'
    cores without GPUs, else 1."""

    label_selector: Mapping[str, str] | None = None
    """Labels of the machines on which actors may live, as Ray knows them."""

    placement_timeout_s: float = 60.0
    """Seconds to wait for the cluster to find room for an actor. Raise it where machines have to
    be started first."""

    tasks_per_actor: int = 2
    """Shards or slices handed to an actor at once: one being scored, the rest waiting for it."""

    max_attempts: int = 3
    """Actors that may die over the same shard before the row that kills them is looked for, which
    then gets no reward; or be found wrong in the same place, one after the other, before the job
    gives up. Machines that go, taken back or broken, do not count."""

    silent_after_s: float = 900.0
    """Seconds that a busy actor may go without finishing a batch, or take to load its model. After
    that it is replaced."""

    head_sync: Literal["verify", "broadcast"] = "verify"
    """Where an untrained head comes from. "verify": each actor draws it, and all must agree.
    "broadcast": the first actor's goes to all, for machines that draw other bits from one seed."""

    mixed_hardware: Literal["refuse", "alike", "accept"] = "refuse"
    """What happens where actors hold the same model but compute other bits with it. "refuse": an
    error. "alike": only those like most of them work. "accept": all of them work, and the last bits
    of a reward depend on who scored it."""

    recheck_share: float = 0.005
    """The most of an actor's time that looking at its weights again may take while it works. What
    it did since the last look counts only after the next. 0: never."""

    ray_address: str | None = None
    """Ray cluster to connect to ("auto": the one on this machine). None: RAY_ADDRESS, or else a
    private one in this process's care."""

    def __post_init__(self) -> None:
        if self.num_actors != "auto":
            _check_int("num_actors", self.num_actors, at_least=1)
        if self.num_gpus_per_actor is not None:
            _check(
                _is_number(self.num_gpus_per_actor) and 0 <= self.num_gpus_per_actor <= 1,
                f"num_gpus_per_actor={self.num_gpus_per_actor!r} is not between 0 and 1: an actor "
                "holds its model on one GPU or on a share of it.",
            )
        if self.num_cpus_per_actor is not None:
            _check_positive("num_cpus_per_actor", self.num_cpus_per_actor)
        if self.min_actors is not None:
            _check_int("min_actors", self.min_actors, at_least=1)
            _check(
                self.num_actors == "auto" or self.min_actors <= self.num_actors,
                f"min_actors={self.min_actors} is more than num_actors={self.num_actors}: work "
                "would never begin. Lower the one or raise the other.",
            )
        _check_positive("placement_timeout_s", self.placement_timeout_s)
        _check_positive("silent_after_s", self.silent_after_s)
        if self.label_selector is not None:
            _check(
                isinstance(self.label_selector, Mapping)
                and all(isinstance(t, str) for kv in self.label_selector.items() for t in kv),
                f"label_selector={self.label_selector!r} must be labels and values, as texts.",
            )
        _check_int("tasks_per_actor", self.tasks_per_actor, at_least=1)
        _check_int("max_attempts", self.max_attempts, at_least=1)
        _check_choices(self)
        _check(
            _is_number(self.recheck_share) and 0 <= self.recheck_share <= 1,
            f"recheck_share={self.recheck_share!r} is not between 0 and 1: it is a share of the "
            "time.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SharingConfig:
    """Who else may use a pool, and how it serves many callers."""

    name: str | None = None
    """By which others find the pool in its Ray cluster. None: they can't."""

    lifetime: Literal["detached"] | None = None
    """ "detached": the pool goes on when the program that opened it ends, until it is shut down."""

    max_wait_ms: float = 5.0
    """How long a text waits for others, so that they are scored together, while there are too few
    of them to keep an actor busy."""

    max_queued_rows: int = 8_192
    """How many texts may wait. More are refused: callers try again."""

    def __post_init__(self) -> None:
        if self.name is not None:
            _check_text("name", self.name, "call the pool something, or leave it out")
        _check(
            self.lifetime in (None, "detached"),
            f"lifetime={self.lifetime!r} must be None or 'detached'.",
        )
        _check(
            self.name is not None or self.lifetime is None,
            "lifetime='detached' needs a name: nobody could find the pool again without.",
        )
        _check(
            _is_number(self.max_wait_ms) and 0 <= self.max_wait_ms <= 60_000,
            f"max_wait_ms={self.max_wait_ms!r} must be a number from 0 to 60,000.",
        )
        _check_int("max_queued_rows", self.max_queued_rows, at_least=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class JobConfig:
    """What a scoring job reads, where it writes, and when it counts as failed."""

    dataset: str
    """File, directory or glob, as a path or URL (s3://, gs://, hf://, https:// …): Parquet, Arrow
    IPC, JSON (lines or an array; also .gz, .zst), or what Hugging Face's save_to_disk wrote."""

    output: str
    """Directory for the result, or a prefix of an object store (s3://, gs://). The same command
    again resumes an unfinished one."""

    rows_per_shard: int | Literal["auto"] = "auto"
    """Rows in a unit of work and in its output file, across files and row groups of the input.
    "auto": a 256th of the dataset, between 64 and 4,096."""

    max_failed_rows: int = 0
    """Rows without a reward that are fine. With more, the job ends with exit code 3."""

    max_failed_share: float = 0.5
    """Share of rows without a reward, among 1,000 or more, at which the job stops: something else
    is wrong then. 1: never."""

    restart: bool = False
    """Throw away what an earlier run left in the output directory and start over."""

    progress: Literal["auto", "bar", "lines", "none"] = "auto"
    """How progress is shown. "auto": a bar on a terminal, plain lines elsewhere."""

    def __post_init__(self) -> None:
        _check_choices(self)
        remedy = "pass a file, a directory or a glob; score_table takes rows in memory"
        _take_path(self, "dataset", remedy)
        _take_path(self, "output", "pass a directory for the result")
        if self.rows_per_shard != "auto":
            _check_int("rows_per_shard", self.rows_per_shard, at_least=1)
        _check_int("max_failed_rows", self.max_failed_rows, at_least=0)
        _check(
            _is_number(self.max_failed_share) and 0 <= self.max_failed_share <= 1,
            f"max_failed_share={self.max_failed_share!r} is not between 0 and 1: it is a share of "
            "the rows.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """Where a pool is served over HTTP, and for whom."""

    host: str = "127.0.0.1"
    """Address to listen on. Others than this machine's own need a token."""

    port: int = 8000
    """Port to listen on."""

    token_file: str | None = None
    """File with the token that requests must carry, as "Authorization: Bearer TOKEN". None: the
    environment variable RAYREWARD_TOKEN has it, or anybody on this machine may ask."""

    max_body_mb: float = 16.0
    """The largest body of a request, in MiB."""

    timeout_s: float = 600.0
    """Seconds that a request may take. After that it is dropped, and answered with 504."""

    drain_s: float = 60.0
    """Seconds to go on answering what has been asked, when the server is told to end."""

    def __post_init__(self) -> None:
        _check_text("host", self.host, "pass an address, such as 127.0.0.1")
        _check_int("port", self.port, at_least=1, at_most=65_535)
        for name in ("max_body_mb", "timeout_s", "drain_s"):
            _check_positive(name, getattr(self, name))


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _check_int(name: str, value: object, *, at_least: int, at_most: float = math.inf) -> None:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    upper = "" if at_most == math.inf else f" and at most {at_most}"
    auto = " (or 'auto')" if name in _AUTO else ""
    _check(
        is_int and at_least <= typing.cast(int, value) <= at_most,
        f"{name}={value!r} must be a whole number of at least {at_least}{upper}{auto}.",
    )


_AUTO = ("max_batch_tokens", "num_actors", "rows_per_shard")
"""Numbers that may also be left to RayReward."""


def _check_positive(name: str, value: object) -> None:
    _check(
        _is_number(value) and 0 < typing.cast(float, value) < math.inf,
        f"{name}={value!r} must be a number above 0.",
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_text(name: str, value: object, remedy: str) -> None:
    _check(isinstance(value, str) and bool(value), f"{name}={value!r} is no text: {remedy}.")


def path_of(path: str | os.PathLike[str]) -> str:
    """A path as text. What is none stays as it is, for a config to refuse."""
    return os.fspath(path) if isinstance(path, os.PathLike) else path


def _take_path(config: Any, name: str, remedy: str) -> None:
    value: object = path_of(getattr(config, name))
    # not a model or a table, of which nobody wants to read all
    told = repr(value) if isinstance(value, str | None) else f"a {type(value).__name__}"
    _check(isinstance(value, str) and bool(value), f"{name} is {told} and no path: {remedy}.")
    object.__setattr__(config, name, value)


def _check_choices(config: Any) -> None:
    """Refuses a value that is none of its field's `Literal` choices, or neither True nor False."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        hint, value = hints[field.name], getattr(config, field.name)
        if typing.get_origin(hint) is Literal:
            choices = typing.get_args(hint)
            listed = ", ".join(repr(choice) for choice in choices)
            _check(value in choices, f"{field.name}={value!r} must be one of {listed}.")
        elif hint is bool:
            _check(value in (True, False), f"{field.name}={value!r} must be True or False.")
