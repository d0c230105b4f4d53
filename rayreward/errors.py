"""Every error that RayReward raises on purpose.

    RayRewardError
    ├── ConfigError (ValueError)         a setting is out of range or contradicts another
    ├── ModelError (ValueError)          the checkpoint can't be loaded as a reward model
    ├── DataError (ValueError)           the dataset can't be read or understood
    ├── OutputError (RuntimeError)       the output directory can't take this run
    ├── NoRewardError (ValueError)       a text has no reward, and must have one
    └── PoolError (RuntimeError)         the actors can't do the work
        ├── PlacementError               no actor found a place in the cluster
        ├── DeterminismError             actors that must be alike are not; carries the report
        ├── PoolClosedError              the pool was used after close(), or is gone
        ├── PoolBusyError                too much waits already; try again
        └── PoolTimeoutError             no answer in time; a TimeoutError too

`Interrupted` stands beside the tree: it is a `KeyboardInterrupt`, so that no `except Exception`
on its way out can swallow it.

Each message says what happened, to what, and what to do next. All of them survive pickling,
since Ray carries them between processes. This module knows nothing else of the package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rayreward.determinism import DeterminismReport


class RayRewardError(Exception):
    """Base of every error that RayReward raises on purpose."""


class ConfigError(RayRewardError, ValueError):
    """A setting is out of range or contradicts another one."""


class ModelError(RayRewardError, ValueError):
    """The checkpoint can't be loaded as a reward model with one label."""


class DataError(RayRewardError, ValueError):
    """The dataset can't be read, or its rows are in no format that RayReward knows."""


class OutputError(RayRewardError, RuntimeError):
    """The output directory can't take this run, or writing to it failed."""


class NoRewardError(RayRewardError, ValueError):
    """A reward could not be computed, and who asked for it has no way to say so."""


class PoolError(RayRewardError, RuntimeError):
    """The pool's actors can't do the work."""


class PlacementError(PoolError):
    """No actor found a place in the cluster."""


class PoolClosedError(PoolError):
    """The pool was used after it was closed."""


class PoolBusyError(PoolError):
    """More waits to be scored than the pool takes; later there may be room."""


class PoolTimeoutError(PoolError, TimeoutError):
    """The pool did not answer in the time that the caller gave it."""


class DeterminismError(PoolError):
    """Actors that must hold the same model do not.

    Attributes:
        report: What every actor holds and which ones differ.
    """

    def __init__(self, message: str, report: DeterminismReport) -> None:
        super().__init__(message, report)
        self.report = report

    def __str__(self) -> str:
        return str(self.args[0])


class Interrupted(KeyboardInterrupt):
    """A signal asked the job to end.

    Attributes:
        signum: The signal's number; the process exits with 128 + signum.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum
