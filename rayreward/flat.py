"""One flat stream of tokens: groups laid end to end, no padding, shared prefixes only once.

    [prefix A | branch A1 | branch A2 | prefix B | branch B1 | …]

Linear layers, norms and activations see one long row of tokens; only attention knows where a text
begins and ends. It is a function registered with transformers' attention interface, so that any
decoder which calls that interface can run this way.

Attention works in *blocks* of 64 queries. A block holds the tokens of one text at positions
64 c … 64 c + 63; its keys are that text's positions 0 … 64 c + 63. So the shape of the call that
computes a token depends on the token's position alone: not on how long its text is, nor on what
shares the batch, nor on whether its prefix is shared. Kernels sum in an order that goes by shape,
and thus every token keeps its bits. The stream is filled up to a multiple of 16 tokens for the same
reason: below 8 rows, BLAS takes other kernels for a matrix product.

Knows torch and the attention interface; does not know text, heads or how a batch was chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # as everybody calls it
from numpy.typing import NDArray
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from rayreward.types import Group

ATTENTION = "rayreward_flat"
BLOCK = 64
"""Queries in a block: few enough that little is wasted on a text's last one, enough for the kernel
to be efficient."""
_STREAM_MULTIPLE = 16

Index = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Blocks:
    """All blocks of one position range, which are computed in one call. Shape legend: N blocks.

    Attributes:
        number: c, where the range is 64 c … 64 c + 63.
        queries: `(N, 64)` places in the stream; past a text's end its last place is repeated.
        keys: `(N, 64 (c + 1))` places in the stream, likewise.
        rows: Which of the N · 64 results are wanted.
        places: Where in the stream they go.
    """

    number: int
    queries: torch.Tensor
    keys: torch.Tensor
    rows: torch.Tensor
    places: torch.Tensor


@dataclass(frozen=True, slots=True)
class Stream:
    """A batch as one row of T tokens.

    Attributes:
        ids: `(1, T)` token ids.
        positions: `(1, T)`, counting from 0 in each text.
        texts: For each text, the places of its tokens in the stream.
        blocks: What attention computes.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    texts: tuple[Index, ...]
    blocks: tuple[Blocks, ...]


_current: ContextVar[Stream] = ContextVar("stream")


def lay_out(groups: Sequence[Group], fill_id: int, device: torch.device) -> Stream:
    """Lays groups end to end.

    Args:
        groups: In the order wanted; none of their texts may be empty.
        fill_id: A token id to fill the stream up with.
        device: Where the stream is needed.
    """
    ids: list[int] = []
    positions: list[int] = []
    texts: list[Index] = []
    owned_from: list[int] = []
    for group in groups:
        shared = len(group.prefix)
        start = len(ids)
        ids.extend(group.prefix)
        positions.extend(range(shared))
        for number, branch in enumerate(group.branches):
            places = np.arange(len(ids), len(ids) + len(branch))
            texts.append(np.concatenate([np.arange(start, start + shared), places]))
            owned_from.append(shared if number else 0)  # the first branch's text does the prefix
            ids.extend(branch)
            positions.extend(range(shared, shared + len(branch)))
    filling = -len(ids) % _STREAM_MULTIPLE
    return Stream(
        ids=torch.tensor([ids + [fill_id] * filling], device=device),
        positions=torch.tensor([positions + [0] * filling], device=device),
        texts=tuple(texts),
        blocks=_cut_into_blocks(texts, owned_from, device),
    )


def hidden_states(module: PreTrainedModel, stream: Stream) -> torch.Tensor:
    """Runs the body over a stream; returns its last hidden states, `(T, H)`."""
    configs = {id(c): c for c in (module.config, module.config.get_text_config())}.values()
    before = [config._attn_implementation for config in configs]
    token = _current.set(stream)
    try:
        for config in configs:
            config._attn_implementation = ATTENTION
        output = module.base_model(
            input_ids=stream.ids, position_ids=stream.positions, use_cache=False
        )
    finally:
        _current.reset(token)
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation
    hidden: torch.Tensor = output.last_hidden_state[0]
    return hidden


def _cut_into_blocks(
    texts: Sequence[Index], owned_from: Sequence[int], device: torch.device
) -> tuple[Blocks, ...]:
    by_number: dict[int, list[tuple[Index, Index, Index, Index]]] = {}
    for text, first in zip(texts, owned_from, strict=True):
        for number in range(first // BLOCK, -(-len(text) // BLOCK)):
            end = (number + 1) * BLOCK
            padded = np.pad(text[:end], (0, max(0, end - len(text))), mode="edge")
            begin = number * BLOCK
            rows = np.arange(max(first, begin), min(len(text), end))
            block = (padded[begin:], padded, rows - begin, text[rows])
            by_number.setdefault(number, []).append(block)

    def on_device(index: Index) -> torch.Tensor:
        return torch.from_numpy(index).to(device)

    return tuple(
        Blocks(
            number,
            on_device(np.stack([queries for queries, _, _, _ in blocks])),
            on_device(np.stack([keys for _, keys, _, _ in blocks])),
            on_device(np.concatenate([rows + i * BLOCK for i, (*_, rows, _) in enumerate(blocks)])),
            on_device(np.concatenate([places for *_, places in blocks])),
        )
        for number, blocks in sorted(by_number.items())
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
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over the current stream, in the form that transformers calls it.

    `query` is `(1, heads, T, D)`; `key` and `value` may have fewer heads. Returns
    `(1, T, heads, D)`.
    """
    queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))
    result = queries.new_zeros((*queries.shape[:2], values.shape[2]))
    for blocks in _current.get().blocks:
        q, k, v = (
            x[places].transpose(1, 2)
            for x, places in (
                (queries, blocks.queries),
                (keys, blocks.keys),
                (values, blocks.keys),
            )
        )
        mask = _mask(blocks.number, sliding_window, q.device)
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
def _mask(number: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Which keys the queries of block `number` see: `(64, 64 (number + 1))`, true where they do."""
    queries = torch.arange(number * BLOCK, (number + 1) * BLOCK, device=device)[:, None]
    keys = torch.arange((number + 1) * BLOCK, device=device)[None, :]
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)


def _no_mask(*_: Any, **__: Any) -> None:
    """The stream's attention makes its own masks."""


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)
