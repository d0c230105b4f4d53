"""The pools that most tests of a cluster ask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from rayreward import RewardPool


@pytest.fixture(scope="session")
def pool(ray_cluster: Any, tiny_model: str) -> Iterator[RewardPool]:
    """Two actors with the tiny model, for all tests that leave them as they are."""
    from rayreward import RewardPool

    with RewardPool(tiny_model, seed=42, num_actors=2, num_cpus_per_actor=1) as pool:
        yield pool


@pytest.fixture(scope="session")
def _mortal(ray_cluster: Any, tiny_model: str) -> Iterator[RewardPool]:
    from rayreward import RewardPool

    settings: dict[str, Any] = {"num_actors": 2, "num_cpus_per_actor": 1, "recheck_share": 1}
    with RewardPool(tiny_model, seed=42, max_attempts=100, **settings) as pool:
        yield pool


@pytest.fixture
def mortal(_mortal: RewardPool) -> RewardPool:
    """The same, for tests that kill or change an actor and see it replaced, again and again.

    It looks at the weights after every shard.
    """
    _mortal.verify()  # waits for whom the test before has killed
    return _mortal
