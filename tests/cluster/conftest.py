"""The pool that most tests of a cluster ask."""

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
