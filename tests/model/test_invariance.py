"""G3 at load: tried on this hardware, recorded, and kept where the settings insist on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_checkpoint

from rayreward import ModelConfig, ModelError, Scorer, invariance
from rayreward.invariance import find_dependence
from rayreward.model import RewardModel
from rayreward.sizes import Sizes
from rayreward.types import Branch, Outcome, Reward, Text

SAMPLES = [Text("", f"Answer {n} " + "it is fine. " * (n * 7 % 23)) for n in range(40)]


def scorer(path: Path, architecture: str = "llama", **settings: Any) -> Scorer:
    make_checkpoint(path, architecture)
    return Scorer.load(ModelConfig(model=str(path), seed=42, **settings))


def values(outcomes: list[Outcome]) -> list[float]:
    return [outcome.value for outcome in outcomes if isinstance(outcome, Reward)]


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_g3_holds_for_the_flat_stream_and_is_recorded(tmp_path: Path, architecture: str) -> None:
    held = scorer(tmp_path, architecture).fingerprint()
    assert held.layout == "flat"
    assert held.batch_invariant == "holds"


def test_g3_is_not_said_to_hold_for_padded_batches(tmp_path: Path) -> None:
    held = scorer(tmp_path, "bloom").fingerprint()
    assert held.layout == "padded"
    assert held.batch_invariant == "does not hold in padded batches"


@pytest.mark.parametrize("architecture", ["bert", "roberta", "bloom", "llama"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_g3_insisted_on_holds_bitwise(tmp_path: Path, architecture: str, dtype: str) -> None:
    """G3, bitwise: alone, in a crowd and reversed."""
    subject = scorer(tmp_path, architecture, dtype=dtype, batch_invariant=True)
    assert subject.fingerprint().batch_invariant == "holds"
    expected = [value for sample in SAMPLES for value in values(subject.score([sample]))]
    assert len(expected) == len(SAMPLES)
    assert values(subject.score(SAMPLES)) == expected
    assert values(subject.score(SAMPLES[::-1]))[::-1] == expected


def test_g3_given_up_is_not_tried(tmp_path: Path) -> None:
    assert scorer(tmp_path, batch_invariant=False).fingerprint().batch_invariant == "not tried"


def crowded(batch: list[Branch]) -> bool:
    return len(batch) > 6


def sharing(batch: list[Branch]) -> bool:
    return any(branch.shared for branch in batch)


@pytest.mark.parametrize(
    ("moves", "named"),
    [
        (crowded, ("in other company",)),
        (sharing, ("with a shared prefix",)),
        (lambda batch: len(batch) > 3, ("in other company", "with a shared prefix")),
        (
            lambda batch: crowded(batch) and sharing(batch),
            ("in other company", "with a shared prefix"),
        ),
        (lambda batch: False, ()),
    ],
)
def test_what_moves_a_bit_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moves: Callable[[list[Branch]], bool],
    named: tuple[str, ...],
) -> None:
    model = scorer(tmp_path)._model
    honest = RewardModel.states

    def shifted(self: RewardModel, batch: Any) -> Any:
        states = honest(self, batch)
        return states.nextafter(torch.tensor(9.0)) if moves(batch) else states

    monkeypatch.setattr(RewardModel, "states", shifted)
    assert find_dependence(model, 8_192) == named


def test_one_bit_of_one_number_that_a_reward_is_made_of_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reward, rounded to float32, would mostly be the same."""
    model = scorer(tmp_path)._model
    honest = RewardModel.states

    def states(self: RewardModel, batch: Any) -> Any:
        found = honest(self, batch).clone()
        if crowded(batch):
            found[-1, 3] = found[-1, 3].nextafter(torch.tensor(9.0))
        return found

    monkeypatch.setattr(RewardModel, "states", states)
    assert find_dependence(model, 8_192) == ("in other company",)


def test_g3_insisted_on_fills_streams_up_where_their_length_moves_a_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU whose kernels go by the number of rows: all streams get the same one."""
    honest = RewardModel.states

    def by_length(self: RewardModel, batch: Any) -> Any:
        tokens = sum(branch.own for branch in batch)
        rows = self.sizes.filled(tokens)
        states = honest(self, batch)
        return states.nextafter(torch.tensor(9.0)) if rows % 100 > 50 else states

    monkeypatch.setattr(RewardModel, "states", by_length)
    assert scorer(tmp_path).fingerprint().batch_invariant.startswith("does not hold")
    held = scorer(tmp_path, batch_invariant=True, max_batch_tokens=512)
    assert (held.fingerprint().layout, held.fingerprint().batch_invariant) == ("flat", "holds")
    assert held._model.sizes == Sizes(512)


@pytest.mark.parametrize("threads", [1, 2, 16])
def test_g3_holds_with_weights_in_plain_order_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr("rayreward.model.pack_linear_layers", lambda *_: None)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        held = scorer(tmp_path)
        assert held.fingerprint().batch_invariant == "holds"
        alone = [value for sample in SAMPLES for value in values(held.score([sample]))]
        assert values(held.score(SAMPLES)) == alone
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("threads", [3, 5, 16])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_g3_holds_on_any_number_of_threads(
    tmp_path: Path, activation: str, compiled: bool, threads: int
) -> None:
    """Where torch shares what is elementwise out among them, streams and texts differ in length."""
    before = torch.get_num_threads()
    shape = {"intermediate_size": 256, "num_hidden_layers": 3, "hidden_act": activation}
    make_checkpoint(tmp_path, shape=shape)
    try:
        torch.set_num_threads(threads)
        config = ModelConfig(model=str(tmp_path), seed=42, torch_compile=compiled)
        held = Scorer.load(config)
        assert held.fingerprint().compiled is compiled
        alone = [value for sample in SAMPLES for value in values(held.score([sample]))]
        for some in (SAMPLES, SAMPLES[:13], SAMPLES[::3]):
            assert values(held.score(some)) == [alone[SAMPLES.index(each)] for each in some]
    finally:
        torch.set_num_threads(before)


def test_sizes_are_tried_on_a_cpu_where_weights_are_in_plain_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with MKL and AVX-512, whose products go by the number of rows for some shapes."""
    packed = scorer(tmp_path / "packed")._model
    with monkeypatch.context() as patch:
        patch.setattr("rayreward.model.pack_linear_layers", lambda *_: None)
        plain = scorer(tmp_path / "plain")._model
    assert (plain.has_plain_weights, packed.has_plain_weights) == (True, False)
    honest = RewardModel.states

    def states(self: RewardModel, batch: Any) -> Any:
        found = honest(self, batch)
        tokens = self.sizes.filled(sum(branch.own for branch in batch))
        return found.nextafter(torch.tensor(9.0)) if 384 < tokens < 640 else found

    monkeypatch.setattr(RewardModel, "states", states)
    assert find_dependence(plain, 8_192) == ("in other company",)
    assert find_dependence(packed, 8_192) == ()


def test_streams_of_all_sizes_are_tried_as_far_as_memory_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: a bit that moves in streams of 1,024 tokens only; one that moves in none."""
    model = scorer(tmp_path)._model
    honest, sizes = RewardModel.states, []
    monkeypatch.setattr(invariance, "_sizes", lambda model, most: model.sizes.up_to(most))
    model.sizes = Sizes(256, 8)

    def states(self: RewardModel, batch: Any) -> Any:
        sizes.append(self.sizes.filled(sum(branch.own for branch in batch)))
        if sizes[-1] > 1_500:
            raise torch.OutOfMemoryError("no more")
        found = honest(self, batch)
        return found.nextafter(torch.tensor(9.0)) if sizes[-1] == moves_at else found

    monkeypatch.setattr(RewardModel, "states", states)
    moves_at = 1_024
    assert find_dependence(model, 4_096) == ("in other company",)
    assert {512, 768, 1_024} <= set(sizes)
    assert max(sizes) == 1_024
    moves_at = 0
    assert find_dependence(model, 1_280) == ()
    assert max(sizes) == 1_280
    assert find_dependence(model, 4_096) == ()
    assert max(sizes) == 1_536


def test_sharing_that_moves_a_bit_hides_no_size_that_does_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = scorer(tmp_path)._model
    honest = RewardModel.states
    monkeypatch.setattr(invariance, "_sizes", lambda model, most: model.sizes.up_to(most))
    model.sizes = Sizes(256, 8)

    def shifted(self: RewardModel, batch: Any) -> Any:
        states = honest(self, batch)
        moved = sharing(batch) or self.sizes.filled(sum(branch.own for branch in batch)) == 1_024
        return states.nextafter(torch.tensor(9.0)) if moved else states

    monkeypatch.setattr(RewardModel, "states", shifted)
    assert find_dependence(model, 4_096) == ("in other company", "with a shared prefix")


def test_g3_insisted_on_and_impossible_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RewardModel, "states", lambda _, batch: torch.rand(len(batch), 4))
    with pytest.raises(ModelError, match="change on this hardware in other company"):
        scorer(tmp_path, batch_invariant=True)


def test_g3_holds_where_a_longer_neighbour_would_change_a_texts_positions(tmp_path: Path) -> None:
    """LongRoPE takes other frequencies for a whole batch when its longest text is long enough."""
    from transformers import Phi3Config

    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, **factors}
    rope["original_max_position_embeddings"] = 128
    shape = {"rope_parameters": rope, "original_max_position_embeddings": 128}
    make_checkpoint(tmp_path, "phi3", shape=shape)
    assert Phi3Config.from_pretrained(tmp_path).rope_parameters["rope_type"] == "longrope"
    config = ModelConfig(model=str(tmp_path), seed=42)
    subject, short, long = Scorer.load(config), Text("", "short"), Text("", "7" * 150)
    before = subject.fingerprint()
    assert (before.layout, before.batch_invariant) == ("single", "holds")
    expected = values(subject.score([short]))
    assert values(subject.score([short, long]))[:1] == expected
    assert subject.fingerprint() == before
    within = ModelConfig(model=str(tmp_path), seed=42, max_length=128)
    assert Scorer.load(within).fingerprint().layout == "flat"
