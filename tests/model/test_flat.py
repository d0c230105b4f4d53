"""The flat stream: it gives what transformers gives; a text keeps its bits in any company."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # as everybody calls it
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import CONFIGS, ENCODERS, FLAT, NOT_FLAT, NOT_PADDED, make_checkpoint
from transformers import AutoModelForSequenceClassification
from transformers.models.llama.modeling_llama import LlamaMLP

from rayreward import ModelConfig, ModelError, Scorer
from rayreward.batching import share_prefixes
from rayreward.checkpoint import open_checkpoint
from rayreward.flat import lay_out
from rayreward.head import is_head
from rayreward.loading import load_model
from rayreward.model import Loaded, RewardModel
from rayreward.packing import PackedLinear, can_pack
from rayreward.sizes import Sizes
from rayreward.types import Branch, Text

CPU = torch.device("cpu")
FLAT_ENCODERS = tuple(name for name in FLAT if name in ENCODERS)


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


def alone(model: RewardModel, batch: list[Branch]) -> list[float]:
    """The rewards of texts, each in a batch of its own with nothing shared."""
    return [model.rewards([Branch(branch.ids)]).item() for branch in batch]


def crowd(batch: list[Branch]) -> list[Branch]:
    """Texts amid others."""
    others = [Branch(text) for text in texts(5, 64, 130, 1, seed=9)]
    return [*others[:2], *batch, *others[2:]]


def turned(batch: list[Branch]) -> list[Branch]:
    """The same texts in the other order."""
    return share_prefixes([branch.ids for branch in reversed(batch)])


@contextlib.contextmanager
def threads_set_to(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def classifier(architecture: str) -> Any:
    """transformers' own with random weights, the body in bfloat16."""
    config = CONFIGS[architecture]()
    config.num_labels = 1
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_config(config).bfloat16()
    for name, _ in model.named_parameters():
        if is_head(name, model.base_model_prefix):
            model.get_submodule(name.rpartition(".")[0]).float()
    return model.eval().requires_grad_(False)


def reward_model(module: Any) -> RewardModel:
    return RewardModel(module, 0, Loaded("seeded", "bfloat16", 256, "sdpa"))


def layout(module: Any) -> str:
    return reward_model(module).layout


def holds_packed_layers(model: RewardModel) -> bool:
    return any(isinstance(layer, PackedLinear) for layer in model._module.modules())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", FLAT)
def test_what_can_runs_flat_and_decoders_share_prefixes(
    models: Any, architecture: str, dtype: str
) -> None:
    model = models[architecture, dtype]
    assert model.layout == "flat"
    assert model.shares_prefixes == (architecture not in ENCODERS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", NOT_FLAT)
def test_what_cannot_run_flat_is_found_out_and_runs_padded(
    tmp_path: Path, architecture: str, dtype: str
) -> None:
    model = load(tmp_path, architecture, dtype)
    assert model.layout == "padded"
    assert not model.shares_prefixes
    own_layers = architecture in ("falcon", "squeezebert")  # of a class of their own
    assert holds_packed_layers(model) == (can_pack(torch.float32) and not own_layers)


@pytest.mark.parametrize("architecture", NOT_PADDED)
def test_what_padding_changes_is_found_out_and_runs_one_text_at_a_time(
    tmp_path: Path, architecture: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(tmp_path, architecture)
    assert model.layout == "single"
    assert "padding changes" in caplog.text
    batch = [Branch(text) for text in texts(1, 40, 3, 11)]
    assert model.rewards(batch).tolist() == alone(model, batch)


def test_what_is_another_number_at_every_pass_is_refused() -> None:
    module = classifier("llama")
    module.model.embed_tokens.register_forward_hook(
        lambda _module, _args, embedded: embedded + torch.randn_like(embedded)
    )
    with pytest.raises(ModelError, match="not get the same reward twice"):
        reward_model(module)


def test_a_model_that_takes_weights_past_their_layers_has_them_in_plain_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert holds_packed_layers(reward_model(classifier("llama"))) == can_pack(torch.float32)
    monkeypatch.setattr(
        LlamaMLP,
        "forward",
        lambda mlp, x: F.linear(
            mlp.act_fn(F.linear(x, mlp.gate_proj.weight)) * F.linear(x, mlp.up_proj.weight),
            mlp.down_proj.weight,
        ),
    )
    model = reward_model(classifier("llama"))
    assert model.layout == "flat"
    assert not holds_packed_layers(model)


def test_what_pools_in_another_way_is_found_out_and_runs_padded() -> None:
    assert layout(classifier("modernbert")) == "flat"
    module = classifier("modernbert")
    module.config.classifier_pooling = "mean"
    assert layout(module) == "padded"


def test_what_mixes_tokens_outside_of_attention_is_found_out_and_runs_padded() -> None:
    """By so little that no tolerance which lets bfloat16 pass would see it."""
    assert layout(classifier("llama")) == "flat"
    module = classifier("llama")
    module.model.embed_tokens.register_forward_hook(
        lambda _module, _args, embedded: embedded + 0.01 * embedded.roll(1, 1)
    )
    assert layout(module) == "padded"


def test_attention_that_does_not_tell_its_kind_runs_padded() -> None:
    """Taken for causal, an encoder could pass: with random weights it attends to little."""
    assert layout(classifier("bert")) == "flat"
    module = classifier("bert")
    for layer in module.bert.encoder.layer:
        del layer.attention.self.is_causal
    assert layout(module) == "padded"


@pytest.mark.parametrize("architecture", FLAT)
def test_flat_agrees_with_transformers_own_forward(models: Any, architecture: str) -> None:
    model = models[architecture, "float32"]
    a, b, c, d, prefix = texts(1, 63, 64, 130, 60)
    nested = [prefix + b + c, prefix + b + d, prefix + b, prefix + d]
    batch = share_prefixes([a, prefix + b, prefix, prefix + d, *nested, c, a + a, a + b])
    assert {1, 60, 60 + 63} <= {branch.shared for branch in batch}
    expected = [
        model.head.rewards(model._pooled_padded([Branch(branch.ids)])).item() for branch in batch
    ]
    assert model.rewards(batch).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", FLAT)
def test_g3_shared_or_not_alone_or_in_a_crowd_the_same_bits(
    models: Any, architecture: str, dtype: str, threads: int
) -> None:
    """G3, bitwise, for prefixes and branches on all sides of a block's border."""
    model = models[architecture, dtype]
    with threads_set_to(threads):
        for shared in (1, 15, 63, 64, 65, 130):
            [prefix, *branches] = texts(shared, 1, 2, 30, 64, 90, seed=shared)
            ends = [*branches, (), branches[2] + branches[0], branches[2] + branches[1]]
            batch = share_prefixes([prefix + end for end in ends])
            expected = alone(model, batch)
            assert model.rewards(batch).tolist() == expected
            assert model.rewards(crowd(batch))[2:-2].tolist() == expected
            assert model.rewards(turned(batch)).tolist() == expected[::-1]
            in_order = sorted(zip((branch.ids for branch in batch), expected, strict=True))
            together = model.rewards(share_prefixes([text for text, _ in in_order])).tolist()
            assert together == [reward for _, reward in in_order]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", FLAT_ENCODERS)
def test_g3_an_encoders_texts_keep_their_bits_in_any_company(
    models: Any, architecture: str, dtype: str, threads: int
) -> None:
    """G3, bitwise, for texts of all lengths: together, shuffled, and in batches of every size."""
    model = models[architecture, dtype]
    branches = [Branch(text) for text in texts(1, 15, 63, 64, 65, 130, 250, 64, 1, 200)]
    shuffled = np.random.default_rng(0).permutation(len(branches)).tolist()
    with threads_set_to(threads):
        expected = alone(model, branches)
        assert len(set(expected)) == len(branches)
        for order in (range(len(branches)), shuffled):
            for size in (2, 3, 7, 10):
                batches = [order[start : start + size] for start in range(0, len(order), size)]
                for batch in batches:
                    rewards = model.rewards([branches[n] for n in batch]).tolist()
                    assert rewards == [expected[n] for n in batch]


@pytest.mark.parametrize("architecture", ["llama", "bert"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 140), st.lists(st.integers(1, 90), min_size=1, max_size=6)),
        min_size=1,
        max_size=8,
    ),
    seed=st.integers(0, 2**16),
)
def test_g3_random_corpora_keep_their_bits(
    models: Any, architecture: str, rows: Any, seed: int
) -> None:
    """G3, bitwise: prompts with completions, all of which begin alike, or where they happen to."""
    model = models[architecture, "float32"]
    [start] = texts(seed % 30, seed=seed)
    groups = []
    for number, (shared, lengths) in enumerate(rows):
        [prefix, *branches] = texts(shared, *lengths, seed=seed + number)
        groups.append(sorted(start + prefix + branch for branch in branches))
    batch = share_prefixes([text for group in groups for text in group])
    together = model.rewards(batch).tolist()
    assert together == alone(model, batch)
    apart = [reward for g in groups for reward in model.rewards(share_prefixes(g)).tolist()]
    assert together == apart


@pytest.mark.parametrize("architecture", ["llama", "bert", "roberta"])
def test_a_neighbours_nan_does_not_spread(models: Any, architecture: str) -> None:
    model = models[architecture, "float32"]
    poisoned, healthy = texts(30, 40)
    expected = alone(model, [Branch(healthy)])
    weights = model._module.get_input_embeddings().weight
    before = weights[poisoned[0]].clone()
    assert poisoned[0] not in healthy
    try:
        weights[poisoned[0]] = float("nan")
        rewards = model.rewards([Branch(poisoned), Branch(healthy)])
    finally:
        weights[poisoned[0]] = before
    assert rewards[0].isnan()
    assert rewards[1:].tolist() == expected


def test_lay_out_holds_each_shared_token_once() -> None:
    batch = share_prefixes([(5, 6, 7, 8), (5, 6, 7, 9, 3), (5, 6, 2), (5, 6), (4, 1)])
    stream = lay_out(batch, 0, CPU)
    assert stream.ids[0].tolist() == [5, 6, 7, 8, 9, 3, 2, 4, 1] + [0] * 7
    assert stream.positions[0, :9].tolist() == [0, 1, 2, 3, 3, 4, 2, 0, 1]
    assert [text.tolist() for text in stream.texts] == [
        [0, 1, 2, 3],
        [0, 1, 2, 4, 5],
        [0, 1, 6],
        [0, 1],
        [7, 8],
    ]


def test_lay_out_computes_each_token_once() -> None:
    prefix, a, b, c = texts(100, 60, 1, 200)
    stream = lay_out(share_prefixes([prefix + a, prefix + b, prefix, c]), 0, CPU)
    places = torch.cat([shape.places for shape in stream.attention.shapes]).tolist()
    assert sorted(places) == list(range(368)), "361, filled up"


def test_what_fills_a_stream_is_no_longer_than_its_texts() -> None:
    """The variable-length kernel takes as many blocks for each text as the longest one needs."""
    prefix, a, b = texts(100, 60, 30)
    batch = share_prefixes([a, b, b + prefix])
    stream = lay_out(batch, 0, CPU, kernel="varlen", sizes=Sizes(256))
    queries, keys, *longest = stream.attention._lengths
    assert stream.ids.shape == (1, 256)
    assert queries.diff().tolist() == [60, 30, 100, 66]
    assert keys.diff().tolist() == [60, 30, 130, 66]
    assert longest == [100, 130]
    short = lay_out([Branch(b), Branch(b)], 0, CPU, kernel="varlen", sizes=Sizes(256))
    queries, *_ = short.attention._lengths
    assert queries.diff().tolist() == [30] * 8 + [16]


def test_lay_out_for_an_encoder_shares_nothing_and_attends_to_whole_texts() -> None:
    prefix, a, b, c = texts(60, 4, 5, 199)
    stream = lay_out(share_prefixes([prefix + a, prefix + b, c]), 0, CPU, causal=False)
    assert stream.ids[0].tolist() == [*prefix, *a, *prefix, *b, *c]
    assert [text.tolist() for text in stream.texts] == [
        list(range(64)),
        list(range(64, 129)),
        list(range(129, 328)),
    ]
    assert [tuple(shape.queries.shape) for shape in stream.attention.shapes] == [
        (1, 64),
        (1, 128),
        (1, 256),
    ]
    for blocks, text in zip(stream.attention.shapes, stream.texts, strict=True):
        assert torch.equal(blocks.queries, blocks.keys)
        assert blocks.keys[0].tolist() == [*text, *[text[-1]] * (blocks.keys.shape[1] - len(text))]
        assert blocks.places.tolist() == text.tolist()


def test_lay_out_counts_positions_as_roberta_does() -> None:
    """From behind the padding index, where tokens of padding have their place."""
    batch = share_prefixes([(5, 1, 6, 7, 1), (5, 1, 6, 1, 8)])
    stream = lay_out(batch, 1, CPU, padding_idx=1)
    assert stream.positions[0, :7].tolist() == [2, 1, 3, 4, 1, 1, 4]


def test_an_encoders_batches_hold_no_more_than_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts that begin alike are counted in full, since nothing of them is shared."""
    path = str(make_checkpoint(tmp_path, "bert"))
    scorer = Scorer.load(ModelConfig(model=path, seed=42, max_batch_tokens=100))
    sizes: list[int] = []

    def rewards(batch: list[Branch]) -> Any:
        lengths = [len(branch.ids) for branch in batch]
        sizes.append(sum(lengths))
        return [torch.zeros(len(lengths))]

    monkeypatch.setattr(scorer, "_rewards", rewards)
    scorer.score_groups([[Text("It is true. " * 3, f"No {n}.") for n in range(9)]])
    assert len(sizes) > 1
    assert max(sizes) <= 100
