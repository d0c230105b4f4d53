"""The seeded head: where its numbers come from, and how the last layer is applied."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from rayreward.head import Head, is_head, seeded_draws


def test_seeded_draws_equal_manual_seed() -> None:
    with seeded_draws(7):
        drawn = torch.empty(1, 64).normal_(0, 0.02)
    expected = torch.empty(1, 64).normal_(0, 0.02, generator=torch.Generator().manual_seed(7))
    assert torch.equal(drawn, expected)


def test_seeded_draws_leave_the_global_rng_alone() -> None:
    before = torch.get_rng_state()
    with seeded_draws(7):
        torch.empty(1000).normal_()
        nn.init.trunc_normal_(torch.empty(1000))
        torch.rand(10)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeded_draws_are_this_threads_own() -> None:
    """Another thread draws from the global RNG as ever, while this one draws from its seed."""
    torch.manual_seed(3)
    expected_elsewhere = torch.empty(1000).normal_()
    torch.manual_seed(3)
    inside, done = threading.Event(), threading.Event()
    elsewhere: list[torch.Tensor] = []

    def draw_elsewhere() -> None:
        inside.wait(10)
        elsewhere.append(torch.empty(1000).normal_())
        done.set()

    other = threading.Thread(target=draw_elsewhere)
    other.start()
    with seeded_draws(7):
        first = torch.empty(10).normal_()
        inside.set()
        assert done.wait(10)
        second = torch.empty(10).normal_()
    other.join()
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(first, torch.empty(10).normal_(generator=generator))
    assert torch.equal(second, torch.empty(10).normal_(generator=generator))
    assert torch.equal(elsewhere[0], expected_elsewhere)


@pytest.mark.parametrize(
    ("name", "prefix", "expected"),
    [
        ("score.weight", "model", True),
        ("model.layers.0.mlp.up_proj.weight", "model", False),
        ("bert.pooler.dense.bias", "bert", True),
        ("bert.encoder.layer.0.output.dense.weight", "bert", False),
        ("classifier.out_proj.weight", "roberta", True),
        ("modelling.weight", "model", True),
    ],
)
def test_is_head_splits_head_from_body(name: str, prefix: str, expected: bool) -> None:
    assert is_head(name, prefix) is expected


class _Toy(nn.Module):
    base_model_prefix = "model"

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Identity()
        self.score = nn.Linear(48, 1, bias=True)


def test_rewards_keep_their_bits_whatever_rows_are_beside_them() -> None:
    """G3, the head's share of it, bitwise."""
    torch.manual_seed(0)
    head = Head(_Toy(), "model")
    hidden = torch.randn(37, 48)
    together = head.rewards(hidden)
    alone = torch.cat([head.rewards(row[None]) for row in hidden])
    shuffled = head.rewards(hidden.flip(0)).flip(0)
    assert torch.equal(together, alone)
    assert torch.equal(together, shuffled)


def test_rewards_are_the_float64_product_rounded_once() -> None:
    torch.manual_seed(0)
    toy = _Toy()
    weight, bias = toy.score.weight.detach(), toy.score.bias.detach()
    hidden = torch.randn(5, 48).bfloat16()
    expected = (hidden.double() @ weight[0].double() + bias[0].double()).float()
    assert torch.equal(Head(toy, "model").rewards(hidden), expected)


def test_rewards_follow_the_live_weights() -> None:
    """What is hashed is what is used: a flipped bit shows in both."""
    toy = _Toy()
    head = Head(toy, "model")
    before = head.rewards(torch.ones(1, 48))
    head.tensors["score.weight"].view(torch.int32)[0, 0] ^= 1 << 22
    assert not torch.equal(head.rewards(torch.ones(1, 48)), before)
