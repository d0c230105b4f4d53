"""The command line, generated from the configs: a field's name is its flag.

Exit codes: 0 done, or a server told to end; 1 the work failed, or an output is not what it says;
2 a setting, the model or the data is wrong; 3 done, but more rows than allowed have no reward;
130 and 143 ended by Ctrl-C or SIGTERM, to be resumed.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from rayreward import signals
from rayreward.config import JobConfig, ModelConfig, PoolConfig, ServeConfig, SharingConfig
from rayreward.errors import ConfigError, DataError, Interrupted, ModelError, RayRewardError

_FAILED, _WRONG, _INCOMPLETE, _SIGNALLED = 1, 2, 3, 128


@dataclass(frozen=True, kw_only=True)
class Score:
    """Score a dataset with a reward model; write Parquet files with the rewards."""

    model: tyro.conf.OmitArgPrefixes[ModelConfig]
    job: tyro.conf.OmitArgPrefixes[JobConfig]
    pool: tyro.conf.OmitArgPrefixes[PoolConfig]

    def run(self) -> int:
        from rayreward.job import prepare_job
        from rayreward.pool import RewardPool

        job = prepare_job(self.job, self.model)
        config = dataclasses.replace(self.pool, min_actors=self.pool.min_actors or 1)
        with RewardPool.from_config(self.model, config) as pool:
            report = pool.run_job(job)
        print(report)
        if report.too_many_failed:
            _complain(
                f"{report.tally.failed_rows} rows have no reward; reward_status and reward_detail "
                "in the output say why. Mend them, or declare so many fine with --max-failed-rows."
            )
            return _INCOMPLETE
        return 0


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve rewards over HTTP from a pool, until Ctrl-C or SIGTERM: rayreward serve MODEL."""

    model: tyro.conf.OmitArgPrefixes[ModelConfig]
    serve: tyro.conf.OmitArgPrefixes[ServeConfig]
    pool: tyro.conf.OmitArgPrefixes[PoolConfig]
    sharing: tyro.conf.OmitArgPrefixes[SharingConfig]

    def run(self) -> int:
        try:
            from rayreward.serve import check_free, check_reach, serving
        except ImportError as error:
            raise ConfigError(f"{error}: pip install 'rayreward[serve]'") from error
        from rayreward.pool import RewardPool

        check_reach(self.serve)  # before a model is loaded for nothing
        check_free(self.serve)
        name = self.sharing.name or "rayreward"
        sharing = dataclasses.replace(self.sharing, name=name)
        try:
            with (
                RewardPool.from_config(self.model, self.pool, sharing) as pool,
                serving(name, self.serve) as url,
            ):
                held = f"{self.model.model} (head {pool.fingerprint.head[:12]})"
                print(f"serving {held} as pool {name!r} on {url}; {url}/docs says how", flush=True)
                while True:
                    signals.check()
                    time.sleep(0.1)
        except Interrupted:
            return 0


@dataclass(frozen=True, kw_only=True)
class PrintFingerprint:
    """Load a model on this machine and print what a pool would hold, as JSON. Needs no Ray."""

    model: tyro.conf.OmitArgPrefixes[ModelConfig]

    def run(self) -> int:
        from rayreward.scorer import Scorer

        print(json.dumps(Scorer.load(self.model).fingerprint().to_dict(), indent=1))
        return 0


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Check a finished output: its files, rows and model, and a sample of rewards, bit for bit."""

    output: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUTPUT")]
    """The output directory, or its URL."""

    sample: int = 256
    """Rows to score again."""

    all: bool = False
    """Score every row again."""

    model: str | None = None
    """Where the checkpoint is now. None: where it was."""

    def run(self) -> int:
        from rayreward.verification import verify_output

        sample = sys.maxsize if self.all else self.sample
        verification = verify_output(self.output, model=self.model, sample=sample)
        print(verification)
        return 0 if verification.ok else _FAILED


_COMMANDS = {
    "score": Score,
    "serve": Serve,
    "fingerprint": PrintFingerprint,
    "verify": Verify,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """`rayreward COMMAND …`; returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    name, *flags = given or ["--help"]
    command = _COMMANDS.get(name)
    if command is None:
        print(_usage())
        return 0 if name in ("-h", "--help") else _WRONG
    if command is Serve and flags and not flags[0].startswith("-"):
        flags = ["--model", *flags]
    return _guarded(lambda: tyro.cli(command, prog=f"rayreward {name}", args=flags).run())


def _usage() -> str:
    lines = [f"  {name:<12} {command.__doc__}" for name, command in _COMMANDS.items()]
    return "\n".join(["usage: rayreward COMMAND [--help] …", "", *lines])


def score(arguments: Sequence[str] | None = None) -> int:
    """`score_dataset.py …`, which is `rayreward score …`; returns the exit code."""
    return _guarded(lambda: tyro.cli(Score, prog="score_dataset.py", args=arguments).run())


def _guarded(command: Callable[[], int]) -> int:
    """Runs a command; turns our errors into a message and an exit code, without a traceback."""
    logging.basicConfig(format="rayreward: %(message)s", level=logging.WARNING)
    try:
        with signals.watched():
            return command()
    except Interrupted as error:
        name = signal.Signals(error.signum).name
        _complain(f"ended by {name}. What is committed stays; the same command goes on from there.")
        return _SIGNALLED + error.signum
    except (ConfigError, DataError, ModelError) as error:
        _complain(str(error))
        return _WRONG
    except RayRewardError as error:
        _complain(str(error))
        return _FAILED


def _complain(message: str) -> None:
    print(f"rayreward: {message}", file=sys.stderr)
