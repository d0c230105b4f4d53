"""States that go from token to token of a stream: each text has those that it would have alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import CONFIGS, make_checkpoint
from transformers.models.qwen3_5 import modeling_qwen3_5 as own

from rayreward import ModelConfig, Scorer, recurrence
from rayreward.batching import share_prefixes
from rayreward.recurrence import Chains

TOKENS, KEY_HEADS, HEADS, KEYS, VALUES = 40, 2, 4, 10, 40


def in_stream(texts: list[tuple[int, ...]]) -> Chains:
    """Where texts lie that share what the one before them begins with."""
    places: list[np.ndarray[Any, Any]] = []
    shared, tokens = [], 0
    for branch in share_prefixes(texts):
        fresh = np.arange(tokens, tokens + len(branch.ids) - branch.shared)
        before = places[-1][: branch.shared] if places else np.arange(0)
        places.append(np.concatenate([before, fresh]))
        shared.append(branch.shared)
        tokens += len(fresh)
    return Chains(places, shared)


def draw_texts(seed: int) -> list[tuple[int, ...]]:
    """Texts of two different tokens, so that they share beginnings of all lengths."""
    dice = random.Random(seed)
    texts = [tuple(dice.choices((0, 1), k=dice.randint(1, 12))) for _ in range(12)]
    texts.append(texts[0] + (1,))  # one that goes on where another ends
    return sorted(set(texts))


@pytest.mark.parametrize("seed", range(5))
def test_a_text_finds_the_tokens_before_and_the_state_that_they_left(seed: int) -> None:
    """A state is told by the tokens that it has seen."""
    texts = draw_texts(seed)
    chains = in_stream(texts)
    ids = np.zeros(chains.tokens, dtype=np.int64)
    for text, places in zip(share_prefixes(texts), chains.texts, strict=True):
        ids[places] = text.ids
    from_, into, slots = chains.states
    before = chains.before(4)
    seen: list[tuple[int, ...]] = []  # by the state after each token
    kept: dict[int, tuple[int, ...]] = {recurrence._ZEROS: ()}
    for place in range(chains.tokens):
        state = int(from_[place])
        start = seen[-1] if state == recurrence._CONTINUED else kept[state]
        seen.append((*start, int(ids[place])))
        if into[place] >= 0:
            kept[int(into[place])] = seen[-1]
        window = [int(ids[at]) if at >= 0 else None for at in before[place]]
        assert window == ([None] * 4 + list(seen[-1]))[-4:]
    for text, places in zip(share_prefixes(texts), chains.texts, strict=True):
        assert seen[places[-1]] == text.ids
    assert len(kept) - 1 == slots < len(texts)


def rule_inputs() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(1, TOKENS, KEY_HEADS, KEYS),
        torch.randn(1, TOKENS, KEY_HEADS, KEYS),
        torch.randn(1, TOKENS, HEADS, VALUES),
        -torch.rand(1, TOKENS, HEADS),
        torch.rand(1, TOKENS, HEADS),
    ]


@pytest.mark.parametrize("normalize", [True, False])
def test_the_rule_is_that_of_transformers(normalize: bool) -> None:
    given = rule_inputs()
    settings = {"use_qk_l2norm_in_kernel": normalize}
    if not normalize:  # else states explode
        given[0], given[1] = (torch.nn.functional.normalize(x, dim=-1) for x in given[:2])
    ours, _ = recurrence._apply_rule(Chains([np.arange(TOKENS)], [0]), *given, **settings)
    chunks, _ = own.torch_chunk_gated_delta_rule(*given, **settings)
    assert (ours - chunks).abs().max() < 1e-5
    assert ours.shape == chunks.shape


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_g3_the_rule_and_the_convolution_keep_every_bit_in_other_company(threads: int) -> None:
    """Bitwise: a text alone, and the same one begun by others, after others, on more threads."""
    given = rule_inputs()
    weight, rows = torch.randn(24, 4), torch.randn(1, 24, TOKENS)
    shared, text = 12, 26
    # others' tokens lie between those that the second text shares and its own
    places = np.concatenate([np.arange(shared), np.arange(20, 20 + text - shared)])
    chains = Chains([np.arange(20), places, np.arange(34, TOKENS)], [0, shared, 0])
    alone = Chains([np.arange(text)], [0])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        among, _ = recurrence._apply_rule(chains, *given)
        convolved = recurrence._convolve(chains, rows, weight, None, "silu")
    finally:
        torch.set_num_threads(before)
    by_itself, _ = recurrence._apply_rule(alone, *(x[:, places] for x in given))
    assert torch.equal(among[:, places], by_itself)
    by_itself = recurrence._convolve(alone, rows[..., places], weight, None, "silu")
    assert torch.equal(convolved[..., places], by_itself)
    expected = own.causal_conv1d_fn(rows[..., places], weight, None, activation="silu")
    torch.testing.assert_close(by_itself, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("last", ["full_attention", "linear_attention"])
def test_a_model_runs_flat_whichever_layer_is_its_last(last: str, tmp_path: Path) -> None:
    """What follows the last attention is narrowed only where no state goes on through it."""
    types = sorted(["full_attention", "linear_attention"], key=lambda name: name == last)
    shape = {"layer_types": types, "num_hidden_layers": 2}
    path = make_checkpoint(tmp_path / "model", "qwen3_5", shape=shape)
    scorer = Scorer.load(ModelConfig(model=str(path), seed=42))
    assert scorer._model.layout == "flat"
    assert scorer._model.shares_prefixes
    assert (scorer._model._last_attention is None) == (last == "linear_attention")


def test_layers_with_states_are_not_compiled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The compiler would take transformers' own function in, which knows no stream."""
    path = make_checkpoint(tmp_path / "model", "qwen3_5")
    scorer = Scorer.load(ModelConfig(model=str(path), seed=42, torch_compile=True))
    assert scorer._model.layout == "flat"
    assert scorer._model.fused is None
    assert "not compiled: some carry a state from token to token" in caplog.text


def test_outside_of_a_stream_transformers_functions_are_its_own(tmp_path: Path) -> None:
    """A model of the same class that nobody scores gives what it gave before, bit for bit."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["qwen3_5"]())
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        before = model(ids).logits
        path = make_checkpoint(tmp_path / "model", "qwen3_5")
        Scorer.load(ModelConfig(model=str(path), seed=42)).score(["a text"])
        assert hasattr(own.causal_conv1d_fn, "follows_streams")
        assert torch.equal(model(ids).logits, before)
        graph = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(graph(ids, use_cache=False).logits, before)
