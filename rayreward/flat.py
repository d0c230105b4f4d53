"""One flat stream of tokens: groups laid end to end, no padding, shared prefixes only once.

    [prefix A | branch A1 | branch A2 | prefix B | branch B1 | …]

Linear layers, norms and activations see one long row of tokens; only attention knows where a text
begins and ends. It is a function registered with transformers' attention interface, so that any
model which calls that interface can run this way.

Attention works in *blocks*. A decoder's block holds 64 queries, the tokens of one text at positions
64 c … 64 c + 63; its keys are that text's positions 0 … 64 c + 63. So the shape of the call that
computes a token depends on the token's position alone: not on how long its text is, nor on what
shares the batch, nor on whether its prefix is shared. An encoder's block holds a whole text, filled
up to a multiple of 64: there a token sees what follows it, so no prefix is shared, and the shape
depends on the text's own length. Kernels sum in an order that goes by shape, and thus every token
keeps its bits. The stream is filled up to a multiple of 16 tokens for the same reason: below 8
rows, BLAS takes other kernels for a matrix product.

Knows torch and the attention interface; does not know text, heads or how a batch was chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # as everybody calls it
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from rayreward.types import Group

ATTENTION = "rayreward_flat"
BLOCK = 64
"""Queries in a block, or what they are a multiple of: few enough that little is wasted on a text's
last ones, enough for the kernel to be efficient."""
_ROWS_MULTIPLE = 16

_ONEDNN_LINEAR: Any = (
    torch.ops.mkldnn._linear_pointwise if torch.backends.mkldnn.is_available() else None
)
"""The operator that torch.compile takes for linear layers on a CPU."""

Index = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Blocks:
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


@dataclass(frozen=True, slots=True)
class Stream:
    """A batch as one row of T tokens.

    Attributes:
        ids: `(1, T)` token ids.
        positions: `(1, T)`, as the model's embeddings count them in each text.
        texts: For each text, the places of its tokens in the stream.
        causal: Whether a token sees those before it only, or all of its text.
        blocks: What attention computes.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    texts: tuple[Index, ...]
    causal: bool
    blocks: tuple[Blocks, ...]


@dataclass(slots=True)
class _Pass:
    """A forward pass over a stream, and whether attention was called in it."""

    stream: Stream
    attended: bool = False


_current: ContextVar[_Pass] = ContextVar("pass")


def lay_out(
    groups: Sequence[Group],
    fill_id: int,
    device: torch.device,
    *,
    causal: bool = True,
    padding_idx: int | None = None,
) -> Stream:
    """Lays groups end to end.

    Args:
        groups: In the order wanted; none of their texts may be empty.
        fill_id: A token id to fill the stream up with.
        device: Where the stream is needed.
        causal: Whether a token sees those before it only. Where it sees all of its text, a prefix
            is not the same under two branches, and nothing is shared.
        padding_idx: Of the model's position embeddings, where they have one.
    """
    if not causal:
        groups = [Group((), (text,)) for group in groups for text in group.texts]
    ids: list[int] = []
    positions: list[int] = []
    texts: list[Index] = []
    owned_from: list[int] = []
    for group in groups:
        shared = len(group.prefix)
        start = len(ids)
        ids.extend(group.prefix)
        positions.extend(_positions(group.prefix, padding_idx))
        for number, (branch, text) in enumerate(zip(group.branches, group.texts, strict=True)):
            places = np.arange(len(ids), len(ids) + len(branch))
            texts.append(np.concatenate([np.arange(start, start + shared), places]))
            owned_from.append(shared if number else 0)  # the first branch's text does the prefix
            ids.extend(branch)
            positions.extend(_positions(text, padding_idx)[shared:])
    filling = -len(ids) % _ROWS_MULTIPLE
    return Stream(
        ids=torch.tensor([ids + [fill_id] * filling], device=device),
        positions=torch.tensor([positions + [0] * filling], device=device),
        texts=tuple(texts),
        causal=causal,
        blocks=_cut_into_blocks(texts, owned_from, device, causal=causal),
    )


def run(module: PreTrainedModel, stream: Stream) -> None:
    """Runs a model's own forward over a stream, as if it were a batch of one row.

    Raises:
        ValueError: The model's attention is of the other kind than the stream's, or is not called
            by way of transformers' attention interface.
    """
    configs = {id(c): c for c in (module.config, module.config.get_text_config())}.values()
    before = [config._attn_implementation for config in configs]
    current = _Pass(stream)
    token = _current.set(current)
    try:
        for config in configs:
            config._attn_implementation = ATTENTION
        with _OnStream(stream):
            module(input_ids=stream.ids, position_ids=stream.positions, use_cache=False)
    finally:
        _current.reset(token)
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation
    if not current.attended:
        raise ValueError("the model never called the attention interface")


class _OnStream(TorchFunctionMode):
    """Changes two functions while a model runs over a stream.

    `F.linear` goes to oneDNN (`_linear`).

    `hidden[:, 0]`, what encoders pool by, gives the first token of every text. They take it for the
    first token of each row in a batch, be it in the body, in the head or between the two; but the
    stream is one row. `(1, T, H)` becomes `(M, H)`, where M is the number of texts filled up to a
    multiple of 16 by repeating the last one, as the stream is.
    """

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        firsts = np.array([text[0] for text in stream.texts])
        firsts = np.pad(firsts, (0, -len(firsts) % _ROWS_MULTIPLE), mode="edge")
        self._firsts = torch.from_numpy(firsts).to(stream.ids.device)
        self._tokens = stream.ids.shape[1]

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.linear and _ONEDNN_LINEAR is not None:
            return _linear(*args, **(kwargs or {}))
        if func is torch.Tensor.__getitem__:
            match args:
                case (
                    torch.Tensor(shape=(1, self._tokens, _)) as hidden,
                    (slice(start=None, stop=None), int(0), *rest),
                ):
                    return hidden[(0, self._firsts, *rest)]
        return func(*args, **(kwargs or {}))


def _linear(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`F.linear`, by oneDNN where torch would take MKL: in float32 on a CPU.

    Faster there by a sixth to two fifths (2,048 rows, AVX-512), and as indifferent to the number of
    rows. The weights stay as they are.
    """
    if rows.dtype is torch.float32 and rows.device.type == "cpu" and weight.dtype is rows.dtype:
        product: torch.Tensor = _ONEDNN_LINEAR(rows, weight, bias, "none", [], "")
        return product
    return F.linear(rows, weight, bias)


def _positions(text: Sequence[int], padding_idx: int | None) -> Sequence[int]:
    """The positions of a text's tokens, from 0.

    RoBERTa and its kin have a position for padding, wherever it stands, and count the other tokens
    from the next one. Source: transformers' RobertaEmbeddings.create_position_ids_from_input_ids.
    """
    if padding_idx is None:
        return range(len(text))
    counted = [token != padding_idx for token in text]
    numbers = accumulate(counted)
    return [padding_idx + number * count for number, count in zip(numbers, counted, strict=True)]


def _cut_into_blocks(
    texts: Sequence[Index], owned_from: Sequence[int], device: torch.device, *, causal: bool
) -> tuple[Blocks, ...]:
    by_range: dict[tuple[int, int], list[tuple[Index, Index, int, Index, Index]]] = {}
    for text, first in zip(texts, owned_from, strict=True):
        ends = range(BLOCK, len(text) + BLOCK, BLOCK)
        ranges = [(end - BLOCK, end) for end in ends if end > first] if causal else [(0, ends[-1])]
        for begin, end in ranges:
            padded = np.pad(text[:end], (0, max(0, end - len(text))), mode="edge")
            rows = np.arange(max(first, begin), min(len(text), end))
            block = (padded[begin:], padded, len(text), rows - begin, text[rows])
            by_range.setdefault((begin, end), []).append(block)

    def on_device(index: Index) -> torch.Tensor:
        return torch.from_numpy(index).to(device)

    return tuple(
        Blocks(
            queries=on_device(np.stack([queries for queries, *_ in blocks])),
            keys=on_device(np.stack([keys for _, keys, *_ in blocks])),
            lengths=on_device(np.array([length for _, _, length, *_ in blocks])),
            rows=on_device(
                np.concatenate([r + i * (end - begin) for i, (*_, r, _) in enumerate(blocks)])
            ),
            places=on_device(np.concatenate([places for *_, places in blocks])),
        )
        for (begin, end), blocks in sorted(by_range.items())
    )


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over the current stream, in the form that transformers calls it.

    `query` is `(1, heads, T, D)`; `key` and `value` may have fewer heads. Returns
    `(1, T, heads, D)`. Whether it is causal is told where transformers' own functions look for it.
    """
    current = _current.get()
    current.attended, stream = True, current.stream
    if stream.causal != (module.is_causal if is_causal is None else is_causal):
        raise ValueError("the stream was laid out for attention of the other kind")
    queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))
    result = queries.new_zeros((*queries.shape[:2], values.shape[2]))
    for blocks in stream.blocks:
        q, k, v = (
            x[places].transpose(1, 2)
            for x, places in (
                (queries, blocks.queries),
                (keys, blocks.keys),
                (values, blocks.keys),
            )
        )
        if stream.causal:
            mask = _before(q.shape[2], k.shape[2], sliding_window, q.device)
        else:
            mask = _throughout(blocks, sliding_window)
        if softcap is None:
            gqa = q.shape[1] != k.shape[1]
            attended = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=scaling, enable_gqa=gqa
            )
        else:
            attended = _softcapped(q, k, v, mask, scaling, softcap)
        flat = attended.transpose(1, 2).flatten(0, 1)
        result[blocks.places] = flat[blocks.rows]
    return result[None], None


def _softcapped(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    softcap: float,
) -> torch.Tensor:
    """Attention with capped scores. Source: transformers' Gemma2 eager_attention_forward."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32)
    return weights.to(q.dtype) @ v


@lru_cache(maxsize=1024)
def _before(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Which keys causal queries see: `(Q, K)`, true where they do."""
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def _throughout(blocks: Blocks, window: int | None) -> torch.Tensor:
    """Which keys an encoder's queries see: `(N, 1, 1 or Q, K)`, true where they do."""
    key = torch.arange(blocks.keys.shape[1], device=blocks.keys.device)
    seen = (key < blocks.lengths[:, None])[:, None, None]
    return seen if window is None else seen & ((key - key[:, None]).abs() < window)


def _no_mask(*_: Any, **__: Any) -> None:
    """The stream's attention makes its own masks."""


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)
