"""oom: a batch that does not fit goes in halves; nothing is lost, and larger ones come back."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_checkpoint

from rayreward import ModelConfig, Scorer
from rayreward.batching import share_prefixes
from rayreward.model import RewardModel
from rayreward.oom import _CALM_BATCHES, Halving, read
from rayreward.types import Branch, Failure, Reward, Status, Text


class Device:
    """Has room for so many tokens, prefixes once; a text's reward is its length."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.batches: list[int] = []

    def __call__(self, batch: Sequence[Branch]) -> Any:
        assert not batch or not batch[0].shared
        tokens = sum(branch.own for branch in batch)
        if tokens > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore")
        self.batches.append(len(batch))
        lengths = [len(branch.ids) for branch in batch]
        return torch.tensor(lengths, dtype=torch.float32)


def texts(*lengths: int) -> list[Branch]:
    return [Branch((7,) * length) for length in lengths]


def test_batch_that_fits_is_one() -> None:
    device = Device(100)
    assert read(Halving(device)(texts(10, 20, 30))) == [10, 20, 30]
    assert device.batches == [3]


def test_batch_that_does_not_fit_goes_in_halves_and_so_do_the_next() -> None:
    device = Device(70)
    halving = Halving(device)
    assert read(halving(texts(*range(10, 18)))) == list(range(10, 18))
    assert device.batches == [4, 4]
    assert read(halving(texts(*[10] * 8))) == [10] * 8
    assert device.batches[2:] == [4, 4]


def test_texts_that_share_a_prefix_are_split_and_each_part_has_it() -> None:
    device = Device(50)
    batch = share_prefixes([(1,) * 20 + (n,) * 10 for n in range(2, 10)])
    assert read(Halving(device)(batch)) == [30] * 8
    assert device.batches == [2, 2, 2, 2]


def test_text_that_does_not_fit_alone_has_no_reward_and_the_others_have() -> None:
    assert read(Halving(Device(50))(texts(10, 60, 20, 30))) == [10, None, 20, 30]


def test_whole_batches_come_back() -> None:
    device = Device(30)
    halving = Halving(device)
    halving(texts(10, 10, 10, 10))
    device.room, device.batches = 1000, []
    for _ in range(_CALM_BATCHES + 1):
        halving(texts(10, 10, 10, 10))
    assert device.batches == [2, 2] * _CALM_BATCHES + [4]


@pytest.mark.parametrize("batch", [[], texts(5)])
def test_smallest_batches(batch: list[Branch]) -> None:
    halving = Halving(Device(10))
    halving(texts(8, 8, 8))
    assert read(halving(batch)) == [5.0] * len(batch)


def test_g3_out_of_memory_moves_no_bit_and_a_text_too_large_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As CUDA would raise it, on a real model."""
    make_checkpoint(tmp_path)
    scorer = Scorer.load(ModelConfig(model=str(tmp_path), seed=42))
    samples = [Text("", f"Answer {n} " + "it is fine. " * (n % 9)) for n in range(30)]
    expected = scorer.score(samples)
    honest = RewardModel.rewards

    def small(self: RewardModel, batch: Sequence[Branch]) -> Any:
        if sum(len(branch.ids) for branch in batch) > 150:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return honest(self, batch)

    monkeypatch.setattr(scorer._rewards, "_rewards", small.__get__(scorer._model))
    with caplog.at_level(logging.WARNING):
        outcomes = scorer.score([*samples, Text("", "7" * 200)])
    assert outcomes[:-1] == expected
    assert all(isinstance(outcome, Reward) for outcome in expected)
    last = outcomes[-1]
    assert isinstance(last, Failure)
    assert last.status is Status.OUT_OF_MEMORY
    assert "going on with half" in caplog.text
