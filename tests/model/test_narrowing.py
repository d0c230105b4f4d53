"""After the last attention only the tokens go on that a reward comes from; no bit is moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import ENCODERS, FLAT, make_checkpoint

from rayreward import ModelConfig
from rayreward.checkpoint import open_checkpoint
from rayreward.loading import load_model
from rayreward.model import RewardModel
from rayreward.types import Branch

NARROWED = tuple(name for name in FLAT if name not in (*ENCODERS, "gpt2"))
"""GPT-2 insists on the shape that it began with, and an encoder pools by place."""


def load(path: Path, architecture: str, dtype: str = "float32") -> RewardModel:
    make_checkpoint(path, architecture)
    config = ModelConfig(model=str(path), seed=42, dtype=dtype)  # type: ignore[arg-type]
    return load_model(open_checkpoint(config.model), config, 0, "cpu")


def texts(*lengths: int) -> list[Branch]:
    dice = np.random.default_rng(3)
    return [Branch(tuple(dice.integers(3, 400, length).tolist())) for length in lengths]


def rows_of_layers(model: RewardModel, batch: list[Branch]) -> list[int]:
    """How many rows each linear layer gets."""
    rows: list[int] = []

    def note(_layer: Any, args: tuple[torch.Tensor], _result: Any) -> None:
        rows.append(args[0].numel() // args[0].shape[-1])

    layers = [m for m in model._module.modules() if type(m).__name__ == "PackedLinear"]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    model.rewards(batch)
    for hook in hooks:
        hook.remove()
    return rows


def test_the_last_layer_computes_what_follows_attention_for_pooled_tokens(tmp_path: Path) -> None:
    """Of two layers of seven products, all but queries, keys and values of the second."""
    model = load(tmp_path, "llama")
    assert rows_of_layers(model, texts(50, 60, 130)) == [240] * 10 + [8] * 4
    assert rows_of_layers(model, texts(*[2] * 17)) == [40] * 10 + [24] * 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", NARROWED)
def test_g3_no_bit_is_moved(tmp_path: Path, architecture: str, dtype: str) -> None:
    """G3, bitwise: with as few texts as possible, with many, and with as many texts as tokens."""
    model = load(tmp_path, architecture, dtype)
    assert model._last_attention == 2
    for batch in (texts(90), texts(*range(1, 80)), texts(*[1] * 16), texts(*[1] * 40)):
        narrowed = model.rewards(batch)
        model._last_attention = None
        whole = model.rewards(batch)
        model._last_attention = 2
        assert torch.equal(narrowed, whole)


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_what_can_not_be_narrowed_is_found_out(tmp_path: Path, architecture: str) -> None:
    model = load(tmp_path, architecture)
    assert model.layout == "flat"
    assert model._last_attention is None
