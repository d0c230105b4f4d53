"""hashing: every accident to the weights shows; the hash is of the weights and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rayreward.hashing import (
    _CHUNK_WORDS,
    _sums_by_numpy,
    _sums_on_device,
    _sums_on_host,
    hash_tensors,
    hash_weights,
)

Hash = Callable[[list[tuple[str, torch.Tensor]]], str]

pytestmark = pytest.mark.parametrize("hashed", [hash_tensors, hash_weights])


def weights() -> list[tuple[str, torch.Tensor]]:
    """Several chunks and a rest, odd numbers of bytes, every kind of dtype, nothing at all."""
    torch.manual_seed(0)
    return [
        ("large", torch.randn(3, _CHUNK_WORDS + 7)),
        ("half", torch.randn(5, 3).bfloat16()),
        ("bytes", torch.arange(7, dtype=torch.uint8)),
        ("flag", torch.tensor(True)),
        ("count", torch.arange(5)),
        ("none", torch.empty(0)),
    ]


def test_g1_same_weights_same_hash_in_any_order(hashed: Hash) -> None:
    expected = hashed(weights())
    assert hashed(weights()[::-1]) == expected
    assert len(expected) == 64


def test_g1_any_flipped_bit_shows(hashed: Hash) -> None:
    expected = hashed(weights())
    for index in range(5):
        content = weights()[index][1].reshape(-1).view(torch.uint8)
        for at in {0, len(content) // 2, len(content) - 1}:
            for bit in (0, 7) if weights()[index][0] != "flag" else (0,):
                changed = weights()
                changed[index][1].reshape(-1).view(torch.uint8)[at] ^= 1 << bit
                assert hashed(changed) != expected, (index, at, bit)


def test_g1_two_flipped_sign_bits_show(hashed: Hash) -> None:
    """They cancel out in a sum of whole words modulo the word's size."""
    changed = weights()
    changed[0][1][0, :2] *= -1
    assert hashed(changed) != hashed(weights())


def test_g1_order_shows(hashed: Hash) -> None:
    for first, second in [(0, 1), (3, _CHUNK_WORDS + 3), (1, 2 * _CHUNK_WORDS + 9)]:
        changed = weights()
        flat = changed[0][1].view(-1)
        flat[[first, second]] = flat[[second, first]].clone()
        assert hashed(changed) != hashed(weights())


def test_g1_names_dtypes_and_shapes_show(hashed: Hash) -> None:
    same_bytes = [
        [("a", torch.zeros(6))],
        [("b", torch.zeros(6))],
        [("a", torch.zeros(2, 3))],
        [("a", torch.zeros(6, dtype=torch.int32))],
        [("a", torch.zeros(5)), ("b", torch.zeros(1))],
        [("a", torch.zeros(7))],
        [("a", torch.zeros(0))],
        [],
    ]
    assert len({hashed(tensors) for tensors in same_bytes}) == len(same_bytes)


def test_views_hash_like_copies(hashed: Hash) -> None:
    whole = torch.arange(64, dtype=torch.float32).view(8, 8)
    odd = torch.arange(9, dtype=torch.uint8)[1:]
    assert hashed([("a", whole.t())]) == hashed([("a", whole.t().contiguous())])
    assert hashed([("a", odd)]) == hashed([("a", odd.clone())])


def test_g1_host_and_device_sum_alike(hashed: Hash) -> None:
    """Our own kernel, NumPy, and the way of a GPU, gone on the CPU."""
    for length in (0, 1, _CHUNK_WORDS, 40 * _CHUNK_WORDS + 5):
        words = torch.randint(-(2**31), 2**31, (length,)).int()
        words[: length // 2 : 3] = -(2**31)
        on_host = _sums_on_host(words.numpy())
        assert (on_host == _sums_by_numpy(words.numpy())).all()
        assert (on_host == _sums_on_device(words).numpy()).all()


def test_hash_is_frozen(hashed: Hash) -> None:
    """Outputs carry it: a new way of hashing makes old ones look as if their model had changed."""
    tensors = [("a", torch.arange(40_000).float()), ("b", torch.ones(3).bfloat16())]
    assert (
        hashed(tensors)[:16]
        == {
            "hash_tensors": "b0835b4700e2b47d",
            "hash_weights": "4e123dd7ad219c3f",
        }[hashed.__name__]
    )
