"""Attention in blocks of one shape, by torch's own kernels: anywhere, for any precision.

Kernels sum in an order that goes by the shape of their call. Blocks keep shapes: a decoder's block
holds 64 queries, the tokens of one text at positions 64 c … 64 c + 63; its keys are that text's
positions 0 … 64 c + 63. So the shape of the call that computes a token depends on the token's
position alone: not on how long its text is, nor on what shares the batch, nor on whether its prefix
is shared. An encoder's block holds a whole text, filled up to a multiple of 64: there a token sees
what follows it, and the shape depends on the text's own length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # as everybody calls it

from rayreward.attention.base import Index, Score, on_device

BLOCK = 64
"""Queries in a block, or what they are a multiple of: few enough that little is wasted on a text's
last ones, enough for the kernel to be efficient."""


@dataclass(frozen=True, slots=True)
class Shape:
    """All blocks of one shape, which are computed in one call.

    Shape legend: N blocks, Q queries and K keys in each; the keys are a text's first K positions,
    the queries the last Q of them.

    Attributes:
        queries: `(N, Q)` places in the stream; past a text's end its last place is repeated.
        keys: `(N, K)` places in the stream, likewise.
        lengths: `(N,)`, how many tokens the text of each block has.
        rows: Which of the N · Q results are wanted.
        places: Where in the stream they go.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    lengths: torch.Tensor
    rows: torch.Tensor
    places: torch.Tensor

    @property
    def size(self) -> tuple[int, int]:
        """Q and K."""
        return self.queries.shape[1], self.keys.shape[1]


class Blocks:
    """Attention in blocks whose shape goes by position. Implements `Attention`."""

    def __init__(
        self,
        texts: Sequence[Index],
        owned_from: Sequence[int],
        device: torch.device,
        *,
        causal: bool,
    ) -> None:
        self.causal = causal
        self.calls = 0
        self.shapes = _cut_into_blocks(texts, owned_from, device, causal=causal)

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, score: Score
    ) -> torch.Tensor:
        """As in `Attention`."""
        self.calls += 1
        result = queries.new_zeros((*queries.shape[:2], values.shape[2]))
        compute = _by_sdpa if score.softcap is None else _by_matmul
        for shape in self.shapes:
            q, k, v = queries[shape.queries], keys[shape.keys], values[shape.keys]
            repeats = q.shape[2] // k.shape[2]
            if self.causal:
                hidden = _after(*shape.size, score.window, repeats, q.dtype, q.device)
            else:
                hidden = _outside(shape, score.window, repeats, q.dtype)
            attended = compute(
                _fold(q, repeats), k.transpose(1, 2), v.transpose(1, 2), hidden, score
            )
            result[shape.places] = _unfold(attended, repeats)[shape.rows]
        return result


def _fold(queries: torch.Tensor, repeats: int) -> torch.Tensor:
    """Lays heads with the same keys one below the other: one larger product instead of several.

    `(N, Q, G · R, D)` becomes `(N, G, R · Q, D)`.
    """
    apart: torch.Tensor = queries.unflatten(2, (-1, repeats))
    return apart.permute(0, 2, 3, 1, 4).flatten(2, 3)


def _unfold(attended: torch.Tensor, repeats: int) -> torch.Tensor:
    """`(N, G, R · Q, D)` becomes `(N · Q, G · R, D)`."""
    apart: torch.Tensor = attended.unflatten(2, (repeats, -1))
    return apart.permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)


def _cut_into_blocks(
    texts: Sequence[Index], owned_from: Sequence[int], device: torch.device, *, causal: bool
) -> tuple[Shape, ...]:
    by_range: dict[tuple[int, int], list[tuple[Index, Index, int, Index, Index]]] = {}
    for text, first in zip(texts, owned_from, strict=True):
        ends = range(BLOCK, len(text) + BLOCK, BLOCK)
        ranges = [(end - BLOCK, end) for end in ends if end > first] if causal else [(0, ends[-1])]
        for begin, end in ranges:
            padded = np.pad(text[:end], (0, max(0, end - len(text))), mode="edge")
            rows = np.arange(max(first, begin), min(len(text), end))
            block = (padded[begin:], padded, len(text), rows - begin, text[rows])
            by_range.setdefault((begin, end), []).append(block)

    return tuple(
        Shape(
            queries=on_device(device, np.stack([queries for queries, *_ in blocks])),
            keys=on_device(device, np.stack([keys for _, keys, *_ in blocks])),
            lengths=on_device(device, np.array([length for _, _, length, *_ in blocks])),
            rows=on_device(
                device,
                np.concatenate([r + i * (end - begin) for i, (*_, r, _) in enumerate(blocks)]),
            ),
            places=on_device(device, np.concatenate([places for *_, places in blocks])),
        )
        for (begin, end), blocks in sorted(by_range.items())
    )


def _by_sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor, score: Score
) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=hidden, scale=score.scaling)


def _by_matmul(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor, score: Score
) -> torch.Tensor:
    """With a soft cap, which SDPA has not. Source: transformers' Gemma2 eager_attention_forward."""
    assert score.softcap is not None
    scaling = q.shape[-1] ** -0.5 if score.scaling is None else score.scaling
    scores = torch.tanh(q @ k.transpose(2, 3) * scaling / score.softcap) * score.softcap
    return (scores + hidden).softmax(-1) @ v


@lru_cache(maxsize=1024)
def _after(
    queries: int,
    keys: int,
    window: int | None,
    repeats: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """What hides from causal queries the keys that they don't see: `(1, 1, R · Q, K)`."""
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)
    seen = key <= query
    seen = seen if window is None else seen & (key > query - window)
    return _hiding(seen, dtype).repeat(repeats, 1)[None, None]


def _outside(shape: Shape, window: int | None, repeats: int, dtype: torch.dtype) -> torch.Tensor:
    """The same for an encoder's queries: `(N, 1, 1 or R · Q, K)`."""
    key = torch.arange(shape.keys.shape[1], device=shape.keys.device)
    seen = (key < shape.lengths[:, None])[:, None, None]
    if window is None:
        return _hiding(seen, dtype)
    near = (key - key[:, None]).abs() < window
    return _hiding(seen & near, dtype).repeat(1, 1, repeats, 1)


def _hiding(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where a key is seen, -inf where it is not."""
    zeros = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return zeros.masked_fill(~seen, float("-inf"))
