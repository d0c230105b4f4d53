"""RayReward: reward models on a Ray cluster, loaded alike, checked to be alike, kept alive.

`import rayreward` is light: torch, transformers and Ray are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rayreward._version import __version__

if TYPE_CHECKING:
    from rayreward.config import JobConfig, ModelConfig, PoolConfig, ServeConfig, SharingConfig
    from rayreward.determinism import DeterminismReport
    from rayreward.errors import (
        ConfigError,
        DataError,
        DeterminismError,
        ModelError,
        NoRewardError,
        OutputError,
        PlacementError,
        PoolBusyError,
        PoolClosedError,
        PoolError,
        PoolTimeoutError,
        RayRewardError,
    )
    from rayreward.fingerprint import Fingerprint
    from rayreward.pool import RewardPool
    from rayreward.report import JobReport
    from rayreward.scorer import Scorer

__all__ = [
    "ConfigError",
    "DataError",
    "DeterminismError",
    "DeterminismReport",
    "Fingerprint",
    "JobConfig",
    "JobReport",
    "ModelConfig",
    "ModelError",
    "NoRewardError",
    "OutputError",
    "PlacementError",
    "PoolBusyError",
    "PoolClosedError",
    "PoolConfig",
    "PoolError",
    "PoolTimeoutError",
    "RayRewardError",
    "RewardPool",
    "Scorer",
    "ServeConfig",
    "SharingConfig",
    "__version__",
]

_HOME = {
    "config": ("JobConfig", "ModelConfig", "PoolConfig", "ServeConfig", "SharingConfig"),
    "determinism": ("DeterminismReport",),
    "errors": tuple(name for name in __all__ if name.endswith("Error")),
    "fingerprint": ("Fingerprint",),
    "pool": ("RewardPool",),
    "report": ("JobReport",),
    "scorer": ("Scorer",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"rayreward.{module}"), name)
    raise AttributeError(f"module 'rayreward' has no attribute {name!r}")
