"""Attention over a flat stream: the only place that knows where a text begins and ends.

Kernels sum in an order that goes by the shape of their call. `Blocks` keeps shapes: a decoder's
block holds 64 queries, the tokens of one text at positions 64 c … 64 c + 63; its keys are that
text's positions 0 … 64 c + 63. So the shape of the call that computes a token depends on the
token's position alone: not on how long its text is, nor on what shares the batch, nor on whether
its prefix is shared. An encoder's block holds a whole text, filled up to a multiple of 64: there a
token sees what follows it, and the shape depends on the text's own length.

`Spans` hands the texts as they are to the variable-length kernel that torch has for GPUs,
`Compiled` to our own for CPUs, which sums in one order by construction.

Knows torch; does not know models, heads or how a batch was chosen.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # as everybody calls it
from numpy.typing import NDArray
from torch.nn.attention.varlen import varlen_attn
from torch.profiler import record_function

from rayreward.native import Kernels, find_kernels

BLOCK = 64
"""Queries in a block, or what they are a multiple of: few enough that little is wasted on a text's
last ones, enough for the kernel to be efficient."""

Index = NDArray[np.int64]

Kernel = Literal["compiled", "varlen", "blocks"]


@dataclass(frozen=True, slots=True)
class Score:
    """What a layer makes of the product of a query and a key before the softmax."""

    scaling: float | None
    """Its factor; null for 1/√D."""
    window: int | None
    """How many places back a query sees, its own included; null for all."""
    softcap: float | None
    """What it is squashed to lie within; null for as it is."""


class Attention(Protocol):
    """Attention over one stream of T tokens."""

    causal: bool
    """Whether a token sees those before it only, or all of its text."""

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, score: Score
    ) -> torch.Tensor:
        """Takes `(T, heads, D)` each, keys and values perhaps with fewer heads.

        Returns:
            `(T, heads, D)`; zeros where the stream is only filled up.
        """


def make_attention(
    kernel: Kernel,
    texts: Sequence[Index],
    owned_from: Sequence[int],
    device: torch.device,
    *,
    causal: bool,
) -> Attention:
    """Prepares attention for a stream.

    Args:
        kernel: What computes it.
        texts: For each text, the places of its tokens in the stream.
        owned_from: For each text, from which of its tokens on it is the one to compute them: what
            comes before is shared with an earlier text.
        device: Where the stream is.
        causal: Whether a token sees those before it only, or all of its text.
    """
    kinds: dict[Kernel, Callable[..., Attention]] = {
        "compiled": Compiled,
        "varlen": Spans,
        "blocks": Blocks,
    }
    return kinds[kernel](texts, owned_from, device, causal=causal)


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
        self.shapes = _cut_into_blocks(texts, owned_from, device, causal=causal)

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, score: Score
    ) -> torch.Tensor:
        """As in `Attention`."""
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


def on_device(device: torch.device, values: NDArray[Any]) -> torch.Tensor:
    """Copies numbers to a device, without waiting for what a GPU is still doing."""
    tensor = torch.from_numpy(values)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class Spans:
    """Attention by torch's variable-length kernel, for GPUs. Implements `Attention`.

    Each text is a span of queries, those tokens that it is the one to compute, and a span of keys,
    all of its tokens. The kernel lines a shorter span of queries up with the end of its keys.
    """

    def __init__(
        self,
        texts: Sequence[Index],
        owned_from: Sequence[int],
        device: torch.device,
        *,
        causal: bool,
    ) -> None:
        self.causal = causal
        owned = zip(texts, owned_from, strict=True)
        spans = [(text[first:], text) for text, first in owned if len(text) > first]
        query_lengths, key_lengths = ([len(s[i]) for s in spans] for i in (0, 1))
        self._places = on_device(device, np.concatenate([queries for queries, _ in spans]))
        self._keys = on_device(device, np.concatenate([keys for _, keys in spans]))
        self._lengths: dict[str, Any] = {
            "cu_seq_q": on_device(device, np.cumsum([0, *query_lengths], dtype=np.int32)),
            "cu_seq_k": on_device(device, np.cumsum([0, *key_lengths], dtype=np.int32)),
            "max_q": max(query_lengths),
            "max_k": max(key_lengths),
        }

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, score: Score
    ) -> torch.Tensor:
        """As in `Attention`.

        Raises:
            ValueError: The scores are capped, which the kernel does not do.
        """
        if score.softcap is not None:
            raise ValueError("the variable-length kernel has no soft cap")
        back = -1 if score.window is None else score.window - 1
        result = queries.new_zeros((*queries.shape[:2], values.shape[2]))
        attended: Any = varlen_attn(
            queries[self._places],
            keys[self._keys],
            values[self._keys],
            **self._lengths,
            scale=score.scaling,
            window_size=(back, 0 if self.causal else back),
            **_varlen_options(),
        )
        result[self._places] = attended
        return result


@cache
def _varlen_options() -> dict[str, Any]:
    """Fewer heads of keys are allowed; keys are not split, which would go by the longest text.

    Before torch had these options, it did both unasked.
    """
    known = inspect.signature(varlen_attn).parameters
    return {k: v for k, v in {"enable_gqa": True, "num_splits": 1}.items() if k in known}


class Compiled:
    """Attention by our own kernel for CPUs (`rayreward.native`). Implements `Attention`."""

    def __init__(
        self,
        texts: Sequence[Index],
        owned_from: Sequence[int],
        device: torch.device,
        *,
        causal: bool,
    ) -> None:
        """Takes what `make_attention` does.

        Raises:
            ValueError: There is no such kernel here.
        """
        kernels = find_kernels()
        if not isinstance(kernels, Kernels) or device.type != "cpu":
            raise ValueError(f"no compiled kernel on {device}: {kernels}")
        self.causal = causal
        self._compute = kernels.attention
        self._places = np.concatenate(texts)
        self._lengths = np.array([len(text) for text in texts])
        self._owned_from = np.array(owned_from)

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, score: Score
    ) -> torch.Tensor:
        """As in `Attention`.

        Raises:
            ValueError: The tensors are neither float32 nor bfloat16.
        """
        if queries.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"the compiled kernel has no {queries.dtype}")
        queries, keys, values = (
            x if x.stride(2) == 1 else x.contiguous() for x in (queries, keys, values)
        )
        depth, kv_heads = queries.shape[2], keys.shape[1]
        results = queries.new_zeros((*queries.shape[:2], values.shape[2]))
        tensors = (queries, keys, values, results)
        strides = np.array([x.stride()[:2] for x in tensors])
        with record_function("rayreward::attention"):
            self._compute(
                queries.dtype is torch.bfloat16,
                *(x.data_ptr() for x in tensors),
                strides.ctypes.data,
                kv_heads,
                queries.shape[1] // kv_heads,
                depth,
                values.shape[2],
                self._places.ctypes.data,
                self._lengths.ctypes.data,
                self._owned_from.ctypes.data,
                len(self._lengths),
                depth**-0.5 if score.scaling is None else score.scaling,
                score.softcap or 0.0,
                score.window or 0,
                self.causal,
                torch.get_num_threads(),
            )
        return results
