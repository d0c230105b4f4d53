"""budget: as many tokens as memory holds, within bounds, the same on GPUs that are alike."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import make_checkpoint

from rayreward import ModelConfig, Scorer
from rayreward.budget import fitting

GIB = 2**30


@pytest.mark.parametrize(
    ("free_gib", "kib_per_token", "expected"),
    [(60, 500, 16_384), (50, 500, 16_384), (6, 500, 8_192), (1, 500, 1_024), (0, 500, 1_024)],
)
def test_budget_is_a_power_of_two_that_memory_holds(
    free_gib: float, kib_per_token: float, expected: int
) -> None:
    assert fitting(free_gib * GIB, kib_per_token * 1024) == expected


@pytest.mark.parametrize(("architecture", "expected"), [("llama", 8_192), ("bloom", 1_024)])
def test_budget_on_a_cpu_goes_by_the_layout_and_a_given_one_is_kept(
    tmp_path: Path, architecture: str, expected: int
) -> None:
    path = str(make_checkpoint(tmp_path, architecture))
    assert Scorer.load(ModelConfig(model=path, seed=1)).fingerprint().max_batch_tokens == expected
    given = Scorer.load(ModelConfig(model=path, seed=1, max_batch_tokens=99)).fingerprint()
    assert given.max_batch_tokens == 99
