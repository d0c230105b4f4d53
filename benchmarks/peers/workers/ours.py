"""RayReward: a pool of one actor, its layers compiled; runs what texts share once."""

from __future__ import annotations

import atexit
from collections.abc import Callable

import numpy as np

from rayreward import RewardPool

PACKAGES = ("rayreward", "ray", "torch", "transformers")


def load(checkpoint: str) -> Callable[..., list[float]]:
    pool = RewardPool(checkpoint, num_actors=1, num_cpus_per_actor=2, torch_compile=True)
    atexit.register(pool.close)

    def score(groups: list[list[str]], _: None) -> list[float]:
        rewards = pool.score_completions([""] * len(groups), groups)
        return np.concatenate(rewards).tolist()

    return score
