"""attention: each kernel is plain attention over each text; in blocks a token keeps its bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from rayreward import attention
from rayreward.attention import Blocks, Score, Spans, make_attention
from rayreward.flat import lay_out
from rayreward.types import Group

CPU = torch.device("cpu")
PLAIN = Score(None, None, None)
SCORES = [PLAIN, Score(0.3, None, None), Score(None, 20, None), Score(None, None, 2.0)]


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def groups(*shapes: tuple[int, list[int]]) -> list[Group]:
    """Groups with a prefix and branches of so many tokens."""
    return [Group((3,) * p, tuple((4,) * length for length in lengths)) for p, lengths in shapes]


def tensors(tokens: int, dtype: torch.dtype, heads: int = 6, kv_heads: int = 2) -> Any:
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, heads, 64), (tokens, kv_heads, 64), (tokens, kv_heads, 64))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def plainly(q: Any, k: Any, v: Any, score: Score, *, causal: bool) -> torch.Tensor:
    """One text's attention, `(L, heads, D)`, in float64, where the last queries may be alone."""
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (k, v))
    products = q @ k.transpose(1, 2) * (score.scaling or q.shape[-1] ** -0.5)
    if score.softcap is not None:
        products = torch.tanh(products / score.softcap) * score.softcap
    query = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None]
    key = torch.arange(k.shape[1])
    back = k.shape[1] if score.window is None else score.window
    seen = (query - key < back) & (key <= query if causal else key - query < back)
    return (products.masked_fill(~seen, float("-inf")).softmax(-1) @ v).transpose(0, 1)


def by_definition(
    query: Any,
    key: Any,
    value: Any,
    cu_seq_q: Any,
    cu_seq_k: Any,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
    num_splits: int | None = None,
) -> torch.Tensor:
    """What torch's varlen_attn documents, for a CPU, where its kernel does not run."""
    assert max_q == cu_seq_q.diff().max()
    assert max_k == cu_seq_k.diff().max()
    assert (enable_gqa, num_splits) == (True, 1)
    back, ahead = window_size
    assert ahead in (0, back)
    score = Score(scale, None if back < 0 else back + 1, None)
    spans = zip(
        query.tensor_split(cu_seq_q[1:-1].long()),
        key.tensor_split(cu_seq_k[1:-1].long()),
        value.tensor_split(cu_seq_k[1:-1].long()),
        strict=True,
    )
    return torch.cat([plainly(*s, score, causal=ahead == 0) for s in spans]).to(query.dtype)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("score", SCORES, ids=["plain", "scaled", "window", "softcap"])
@pytest.mark.parametrize("kernel", ["blocks", "varlen"])
def test_every_text_is_attended_to_as_if_alone(
    kernel: Any, score: Score, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "varlen_attn", by_definition)
    monkeypatch.setattr(attention, "_varlen_options", lambda: {"enable_gqa": True, "num_splits": 1})
    batch = groups((70, [5, 0, 90]), (0, [1]), (3, [64, 61]), (0, [129, 2]))
    stream = lay_out(batch, 0, CPU, kernel=kernel, causal=causal)
    q, k, v = tensors(stream.ids.shape[1], torch.float32)
    if kernel == "varlen" and score.softcap is not None:
        with pytest.raises(ValueError, match="no soft cap"):
            stream.attention.attend(q, k, v, score)
        return
    found = stream.attention.attend(q, k, v, score)
    for text in stream.texts:
        expected = plainly(q[text], k[text], v[text], score, causal=causal)
        torch.testing.assert_close(found[text].double(), expected, atol=2e-5, rtol=0)
    filling = np.setdiff1d(np.arange(stream.ids.shape[1]), np.concatenate(stream.texts))
    assert (found[filling] == 0).all()


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_g3_blocks_keep_their_bits_beside_any_number_of_others(
    causal: bool, dtype: torch.dtype
) -> None:
    """G3, bitwise: short texts and long ones, alone and beside 1 to 60 of like length."""
    for length in (5, 64, 200, 1_500):
        together = 61 if length < 1_500 else 7
        q, k, v = tensors(length * together, dtype)
        places = [np.arange(n * length, (n + 1) * length) for n in range(together)]
        for number in (1, 2, 3, together):
            blocks = Blocks(places[:number], [0] * number, CPU, causal=causal)
            found = blocks.attend(q, k, v, PLAIN)
            for chosen in {0, number - 1}:
                alone = Blocks([places[chosen]], [0], CPU, causal=causal)
                expected = alone.attend(q, k, v, PLAIN)[places[chosen]]
                assert torch.equal(found[places[chosen]], expected)


def test_kernels_go_by_their_names() -> None:
    places = [np.arange(4)]
    assert isinstance(make_attention("blocks", places, [0], CPU, causal=True), Blocks)
    assert isinstance(make_attention("varlen", places, [0], CPU, causal=True), Spans)


def test_options_of_the_kernel_are_those_that_torch_knows() -> None:
    assert attention._varlen_options() == {"enable_gqa": True, "num_splits": 1}
