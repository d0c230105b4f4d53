"""The flat stream: it gives what transformers gives; a text keeps its bits in any company."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import ENCODERS, FLAT, NOT_FLAT, make_checkpoint

from rayreward import ModelConfig
from rayreward.batching import share_prefix
from rayreward.checkpoint import open_checkpoint
from rayreward.flat import lay_out
from rayreward.loading import load_model
from rayreward.model import RewardModel
from rayreward.types import Group

CPU = torch.device("cpu")


def load(path: Path, architecture: str, dtype: str = "float32") -> RewardModel:
    make_checkpoint(path, architecture)
    config = ModelConfig(model=str(path), seed=42, dtype=dtype)  # type: ignore[arg-type]
    return load_model(open_checkpoint(config.model), config, 0, "cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], RewardModel]:
    return {
        (name, dtype): load(tmp_path_factory.mktemp(name), name, dtype)
        for name in FLAT
        for dtype in ("float32", "bfloat16")
    }


def texts(*lengths: int, seed: int = 0) -> list[tuple[int, ...]]:
    generator = np.random.default_rng(seed)
    return [tuple(generator.integers(3, 400, length).tolist()) for length in lengths]


def alone(model: RewardModel, group: Group) -> list[float]:
    """The rewards of a group's texts, each in a batch of its own with nothing shared."""
    return [model.rewards([Group((), (text,))]).item() for text in group.texts]


def crowd(groups: list[Group]) -> list[Group]:
    """Groups amid others."""
    others = [Group((), (text,)) for text in texts(5, 64, 130, 1, seed=9)]
    return [*others[:2], *groups, *others[2:]]


@pytest.mark.parametrize("architecture", FLAT)
def test_decoders_run_flat(models: Any, architecture: str) -> None:
    assert models[architecture, "float32"].layout == "flat"
    assert models[architecture, "bfloat16"].layout == "flat"


@pytest.mark.parametrize("architecture", [*ENCODERS, *NOT_FLAT])
def test_what_cannot_run_flat_is_found_out_and_runs_padded(
    tmp_path: Path, architecture: str
) -> None:
    assert load(tmp_path, architecture).layout == "padded"


@pytest.mark.parametrize("architecture", FLAT)
def test_flat_agrees_with_transformers_own_forward(models: Any, architecture: str) -> None:
    model = models[architecture, "float32"]
    a, b, c, d, prefix = texts(1, 63, 64, 150, 70)
    groups = [Group((), (a,)), Group(prefix, (b, (), d)), Group((), (c,)), Group(a, (a, b))]
    expected = [
        model.head.rewards(model._pooled_padded([Group((), (text,))])).item()
        for group in groups
        for text in group.texts
    ]
    assert model.rewards(groups).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", FLAT)
def test_g3_shared_or_not_alone_or_in_a_crowd_the_same_bits(
    models: Any, architecture: str, dtype: str, threads: int
) -> None:
    """G3, bitwise, for prefixes and branches on all sides of a block's border."""
    model = models[architecture, dtype]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shared in (1, 15, 63, 64, 65, 130):
            [prefix, *branches] = texts(shared, 1, 2, 30, 64, 90, seed=shared)
            group = Group(prefix, (*branches, ()))
            expected = alone(model, group)
            assert model.rewards([group]).tolist() == expected
            assert model.rewards(crowd([group]))[2:-2].tolist() == expected
            reverse = Group(prefix, group.branches[::-1])
            assert model.rewards([reverse]).tolist() == expected[::-1]
    finally:
        torch.set_num_threads(before)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 140), st.lists(st.integers(1, 90), min_size=1, max_size=6)),
        min_size=1,
        max_size=8,
    ),
    seed=st.integers(0, 2**16),
)
def test_g3_random_groups_keep_their_bits(models: Any, rows: Any, seed: int) -> None:
    """G3, bitwise, over random corpora."""
    model = models["llama", "float32"]
    groups = []
    for number, (shared, lengths) in enumerate(rows):
        [prefix, *branches] = texts(shared, *lengths, seed=seed + number)
        groups.append(Group(prefix, tuple(branches)))
    together = model.rewards(groups).tolist()
    assert together == [reward for group in groups for reward in alone(model, group)]
    assert together == [reward for group in groups for reward in model.rewards([group]).tolist()]


def test_a_neighbours_nan_does_not_spread(models: Any) -> None:
    model = models["llama", "float32"]
    poisoned, healthy = texts(30, 40)
    expected = alone(model, Group((), (healthy,)))
    weights = model._module.base_model.embed_tokens.weight
    before = weights[poisoned[0]].clone()
    assert poisoned[0] not in healthy
    try:
        weights[poisoned[0]] = float("nan")
        rewards = model.rewards([Group((), (poisoned,)), Group((), (healthy,))])
    finally:
        weights[poisoned[0]] = before
    assert np.isnan(rewards[0])
    assert rewards[1:].tolist() == expected


def test_lay_out_holds_each_shared_token_once() -> None:
    group = share_prefix([(5, 6, 7, 8), (5, 6, 9), (5, 6)])
    assert group == Group((5, 6), ((7, 8), (9,), ()))
    stream = lay_out([group, Group((), ((4,),))], 0, CPU)
    assert stream.ids[0].tolist() == [5, 6, 7, 8, 9, 4] + [0] * 10
    assert stream.positions[0, :6].tolist() == [0, 1, 2, 3, 2, 0]
    assert [text.tolist() for text in stream.texts] == [[0, 1, 2, 3], [0, 1, 4], [0, 1], [5]]


def test_lay_out_computes_each_token_once() -> None:
    prefix, a, b, c = texts(100, 60, 1, 200)
    stream = lay_out([Group(prefix, (a, b, ())), Group((), (c,))], 0, CPU)
    places = torch.cat([blocks.places for blocks in stream.blocks]).tolist()
    assert sorted(places) == list(range(361))
