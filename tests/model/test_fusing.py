"""Compiled layers give the same rewards, are compiled once for all lengths, and can be left again.

`tests/gpu` runs the same on one.
"""

from __future__ import annotations

import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_checkpoint
from torch._dynamo.utils import counters

from rayreward import ModelConfig, Scorer
from rayreward.checkpoint import open_checkpoint
from rayreward.fusing import fuse_layers, gains_together, unfuse_layers
from rayreward.loading import load_model
from rayreward.model import RewardModel
from rayreward.types import Branch

pytestmark = [
    pytest.mark.usefixtures("nothing_compiled"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # the compiler's own
]


def load(path: Path, layers: int) -> RewardModel:
    make_checkpoint(path, shape={"num_hidden_layers": layers})
    config = ModelConfig(model=str(path), seed=42)
    return load_model(open_checkpoint(config.model), config, 0, "cpu")


def texts(*lengths: int) -> list[Branch]:
    dice = np.random.default_rng(3)
    return [Branch(tuple(dice.integers(3, 400, length).tolist())) for length in lengths]


def settles_fusing(model: RewardModel) -> bool:
    batch = model.trial_batch()
    return model._settle_fusing(batch, model._own(batch)) is not None


def is_chained(model: RewardModel) -> bool:
    """Whether layers are compiled together."""
    return isinstance(model._module.model.layers[0]._compiled_call_impl, partial)


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.slow
def test_compiled_layers_score_alike_and_are_compiled_once_for_all_lengths(tmp_path: Path) -> None:
    model = load(tmp_path, 4)
    batches = [texts(50, 60, 130), texts(7), texts(*range(1, 70)), texts(200, 1)]
    plain = [model.rewards(batch) for batch in batches]
    before = graphs()
    assert settles_fusing(model)
    once = graphs()
    assert once == before + 1, "attention splits a layer's graph"
    compiled = [model.rewards(batch) for batch in batches]
    assert [model.rewards(batch).tolist() for batch in batches] == [r.tolist() for r in compiled]
    for mine, theirs in zip(compiled, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    assert graphs() == once
    unfuse_layers(model._module)
    assert all(torch.equal(model.rewards(b), r) for b, r in zip(batches, plain, strict=True))
    fuse_layers(model._module, together=True)
    assert all(torch.equal(model.rewards(b), r) for b, r in zip(batches, compiled, strict=True))
    assert graphs() == once


def test_the_last_layer_is_left_as_it_is_and_a_model_of_one_layer_too(tmp_path: Path) -> None:
    model = load(tmp_path / "three", 3)
    assert fuse_layers(model._module)
    layers = model._module.model.layers
    assert [layer._compiled_call_impl is not None for layer in layers] == [True, True, False]
    unfuse_layers(model._module)
    assert fuse_layers(model._module, together=True)
    assert [layer._compiled_call_impl is not None for layer in layers] == [True, True, False]
    assert not fuse_layers(load(tmp_path / "one", 1)._module)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_are_compiled_on_a_cpu_if_asked_to_and_g3_holds(tmp_path: Path, dtype: str) -> None:
    make_checkpoint(tmp_path, shape={"num_hidden_layers": 3})
    settings: dict[str, Any] = {"model": str(tmp_path), "seed": 42, "dtype": dtype}
    plain = Scorer.load(ModelConfig(**settings), "cpu").fingerprint()
    held = Scorer.load(ModelConfig(**settings, torch_compile=True), "cpu").fingerprint()
    assert (plain.compiled, held.compiled) == (False, True)
    assert held.batch_invariant == "holds"
    assert held.probe == pytest.approx(plain.probe, abs={"float32": 1e-5, "bfloat16": 0.02}[dtype])


@pytest.mark.slow
def test_layers_of_each_kind_have_a_graph_of_their_own(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    shape = {"num_hidden_layers": 4, "sliding_window": 16, "layer_types": kinds}
    make_checkpoint(tmp_path, "gemma2", shape=shape)
    plain = Scorer.load(ModelConfig(model=str(tmp_path), seed=42), "cpu").fingerprint()
    before = graphs()
    scorer = Scorer.load(ModelConfig(model=str(tmp_path), seed=42, torch_compile=True), "cpu")
    assert graphs() == before + 1
    assert is_chained(scorer._model)
    held = scorer.fingerprint()
    assert (held.compiled, held.batch_invariant) == (True, "holds")
    assert held.probe == pytest.approx(plain.probe, abs=1e-5)


def test_on_a_gpu_large_layers_are_not_compiled_together(tmp_path: Path) -> None:
    model = load(tmp_path, 2)
    assert gains_together(model._module)
    config = model._module.config
    for width, expected in ((1_024, True), (8_192, False)):
        config.update({"hidden_size": 2_048, "intermediate_size": width, "head_dim": 64})
        with torch.device("meta"):  # stands for a GPU
            assert gains_together(type(model._module)(config)) is expected


def test_layers_between_which_something_happens_are_not_run_together(tmp_path: Path) -> None:
    model = load(tmp_path, 4)
    fuse_layers(model._module, together=True)
    first, second = model._module.model.layers[:2]
    hidden, mask = torch.zeros(1, 8, 32), torch.zeros(1)
    for other in ({"hidden": hidden + 0, "mask": mask}, {"hidden": hidden, "mask": mask + 0}):
        assert first(hidden, mask=mask) is hidden
        with pytest.raises(ValueError, match="layers are given different things"):
            second(**other)
    assert first(hidden, mask=mask) is hidden
    with pytest.raises(ValueError, match="layers are given different things"):
        second(hidden, mask=mask, more=None)


@pytest.mark.slow
def test_layers_that_are_given_different_things_are_compiled_one_by_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Gemma 3's of one kind turn their heads by other angles than those of the other kind."""
    kinds = ["sliding_attention", "full_attention"] * 2
    shape = {"num_hidden_layers": 4, "sliding_window": 16, "layer_types": kinds}
    make_checkpoint(tmp_path, "gemma3", shape=shape)
    caplog.set_level("INFO", "rayreward")
    settings: dict[str, Any] = {"model": str(tmp_path), "seed": 42}
    plain = Scorer.load(ModelConfig(**settings), "cpu").fingerprint()
    held = Scorer.load(ModelConfig(**settings, torch_compile=True), "cpu").fingerprint()
    assert (held.compiled, held.batch_invariant) == (True, "holds")
    assert held.probe == pytest.approx(plain.probe, abs=1e-5)
    assert "not compiled together: ValueError: layers are given different things" in caplog.text


@pytest.mark.slow
def test_layers_of_more_kinds_than_the_compiler_takes_stay_as_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = [load(tmp_path / name, 3) for name in ("first", "second", "third")]
    for model, function in zip(models[1:], (torch.nn.ReLU(), torch.nn.Tanh()), strict=True):
        for layer in model._module.model.layers:
            layer.mlp.act_fn = function
    expected = models[2].rewards(texts(50))
    with torch._dynamo.config.patch(recompile_limit=1):
        assert [settles_fusing(model) for model in models] == [True, True, False]
    assert [is_chained(model) for model in models] == [True, False, False]
    assert "this process has compiled layers of as many kinds as torch does" in caplog.text
    assert torch.equal(models[2].rewards(texts(50)), expected)


def other(hidden: Any, *_: Any, **__: Any) -> Any:
    return hidden * 1.5


def failing(*_: Any, **__: Any) -> Any:
    raise subprocess.CalledProcessError(1, "gcc")


@pytest.mark.parametrize(
    ("compiled", "reason"),
    [
        (other, "they would give other rewards"),
        (failing, "CalledProcessError: Command 'gcc' returned non-zero exit status 1."),
    ],
)
def test_layers_that_cannot_be_compiled_stay_as_they_are_and_it_is_told_why(
    compiled: Any,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = load(tmp_path, 3)
    batch = texts(50, 60, 130)
    expected = model.rewards(batch)

    def broken(module: Any, *, together: bool) -> bool:
        for layer in module.model.layers[:-1]:
            layer._compiled_call_impl = compiled
        return True

    monkeypatch.setattr("rayreward.model.fuse_layers", broken)
    assert not settles_fusing(model)
    assert torch.equal(model.rewards(batch), expected)
    assert f"the layers of LlamaForSequenceClassification are not compiled: {reason}" in caplog.text
