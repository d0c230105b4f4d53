"""One flat stream of tokens: texts laid end to end, no padding, what they share only once.

    [system prompt | prompt A | answer A1 | answer A2 | prompt B | answer B1 | …]

Of each text the stream holds what it does not have in common with the one before it.

Linear layers, norms and activations see one long row of tokens; only attention knows where a text
begins and ends (`rayreward.attention`). It is a function registered with transformers' attention
interface, so that any model which calls that interface can run this way.

Where a token sees what follows it, as in an encoder, no prefix is shared. The stream is filled up
to a number of tokens for which products are summed as for any other (`rayreward.sizes`), by texts
that nobody reads, none longer than what the longest one adds, since kernels may go by that. So are
the tokens that go on after the last attention (`rayreward.narrowing`).

Knows torch and the attention interface; does not know text, heads or how a batch was chosen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from rayreward.attention import (
    Attention,
    Compiled,
    Index,
    Kernel,
    Score,
    make_attention,
    on_device,
)
from rayreward.narrowing import Narrowing
from rayreward.operators import define
from rayreward.positions import token_positions
from rayreward.recurrence import Chains, follow_streams
from rayreward.sizes import ON_CPU, Sizes
from rayreward.types import Branch

ATTENTION = "rayreward_flat"
ATTENTION_IN_GRAPHS = "rayreward_flat_in_graphs"


@dataclass(frozen=True, slots=True)
class Stream:
    """A batch as one row of T tokens.

    Attributes:
        ids: `(1, T)` token ids.
        positions: `(1, T)`, as the model's embeddings count them in each text.
        texts: For each text, the places of its tokens in the stream.
        attention: Who sees whom.
        chains: Who follows whom.
        sizes: What numbers of tokens are filled up to.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    texts: tuple[Index, ...]
    attention: Attention
    chains: Chains
    sizes: Sizes


@dataclass(slots=True)
class _Pass:
    """A forward pass over a stream.

    Attributes:
        stream: What it runs over.
        wanted: `(M,)` places of the tokens that go on after the last attention.
        last_attention: Its number, from 1; null where all tokens go on.
        narrowed: Whether only the wanted tokens are left.
        modes: What is in force until the pass ends.
    """

    stream: Stream
    wanted: torch.Tensor
    last_attention: int | None
    narrowed: bool = False
    modes: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def has_attended(self) -> None:
        """Attention was called once more."""
        tokens = self.stream.ids.shape[1]
        if self.stream.attention.calls == self.last_attention and len(self.wanted) < tokens:
            self.narrowed = True
            self.modes.enter_context(Narrowing(tokens, self.wanted))


_current: ContextVar[_Pass] = ContextVar("pass")


def lay_out(
    batch: Sequence[Branch],
    fill_id: int,
    device: torch.device,
    *,
    kernel: Kernel = "blocks",
    causal: bool = True,
    padding_idx: int | None = None,
    sizes: Sizes = ON_CPU,
) -> Stream:
    """Lays texts end to end.

    Args:
        batch: In the order wanted; no text may be empty.
        fill_id: A token id to fill the stream up with.
        device: Where the stream is needed.
        kernel: What computes attention.
        causal: Whether a token sees those before it only. Where it sees all of its text, a prefix
            is not the same in two of them, and nothing is shared.
        padding_idx: Of the model's position embeddings, where they have one.
        sizes: What the number of tokens is filled up to.
    """
    ids: list[int] = []
    positions: list[int] = []
    texts: list[Index] = []
    owned_from: list[int] = []
    before = np.arange(0)
    for branch in batch:
        shared = branch.shared if causal else 0
        own = np.arange(len(ids), len(ids) + len(branch.ids) - shared)
        before = np.concatenate([before[:shared], own])
        texts.append(before)
        owned_from.append(shared)
        ids.extend(branch.ids[shared:])
        positions.extend(token_positions(branch.ids, padding_idx)[shared:])
    tokens, filled = len(ids), sizes.filled(len(ids))
    longest = max(len(text) - first for text, first in zip(texts, owned_from, strict=True))
    fillers = [np.arange(at, min(at + longest, filled)) for at in range(tokens, filled, longest)]
    seen, seen_from = [*texts, *fillers], owned_from + [0] * len(fillers)
    return Stream(
        ids=on_device(device, np.array([ids + [fill_id] * (filled - tokens)])),
        positions=on_device(device, np.array([positions + [0] * (filled - tokens)])),
        texts=tuple(texts),
        attention=make_attention(kernel, seen, seen_from, device, causal=causal),
        chains=Chains(seen, seen_from),
        sizes=sizes,
    )


def run(
    module: PreTrainedModel,
    stream: Stream,
    caught: Callable[[Callable[[], object]], torch.Tensor],
    pooled: Sequence[int],
    last_attention: int | None = None,
) -> tuple[torch.Tensor, int]:
    """Runs a model's own forward over a stream, as if it were a batch of one row.

    Args:
        module: The model, its switch thrown.
        stream: What it runs over.
        caught: Runs a forward pass and returns what reached the head.
        pooled: For each text, the position of the token that its reward comes from.
        last_attention: After how many calls of attention only those tokens go on; null for never.

    Returns:
        What reached the head of each text, `(N, H)`, and how often attention was called.

    Raises:
        ValueError: The model's attention is of the other kind than the stream's, or is not called
            by way of transformers' attention interface.
    """
    places = [text[at] for text, at in zip(stream.texts, pooled, strict=True)]
    current = _Pass(stream, _filled(stream, places), last_attention)
    token = _current.set(current)
    try:
        with current.modes:
            if isinstance(stream.attention, Compiled):
                current.modes.enter_context(stream.attention.entered())
            if not stream.attention.causal:
                current.modes.enter_context(_FirstTokens(stream))
            hidden = caught(
                lambda: module(input_ids=stream.ids, position_ids=stream.positions, use_cache=False)
            )
    finally:
        _current.reset(token)
    if not stream.attention.calls:
        raise ValueError("the model never called the attention interface")
    if hidden.dim() == 3:  # else an encoder has pooled already
        hidden = hidden[0] if current.narrowed else hidden[0, current.wanted]
    return hidden[: len(places)], stream.attention.calls


class Switch:
    """Which attention a model's own forward calls: the stream's, or what it was loaded with.

    Thrown before a pass, and not thrown back after it.

    Attributes:
        has_states: Whether there are layers that carry a state from token to token. They see a pass
            over a stream by themselves, and can't stand in graphs.
    """

    def __init__(self, module: PreTrainedModel) -> None:
        configs = {id(c): c for c in (module.config, module.config.get_text_config())}.values()
        self._own = [(config, config._attn_implementation) for config in configs]
        self.has_states = follow_streams(module, _current_chains)

    def to_streams(self, *, in_graphs: bool) -> None:
        """Passes over streams follow, in graphs with attention as an operator or as a break."""
        for config, _ in self._own:
            config._attn_implementation = ATTENTION_IN_GRAPHS if in_graphs else ATTENTION

    def to_own(self) -> None:
        """Passes over padded batches follow."""
        for config, implementation in self._own:
            config._attn_implementation = implementation


def _current_chains() -> Chains | None:
    current = _current.get(None)
    return None if current is None else current.stream.chains


def _filled(stream: Stream, places: Sequence[int]) -> torch.Tensor:
    """`(M,)` places, filled up as the stream is, by repeating the last one."""
    filling = stream.sizes.filled(len(places)) - len(places)
    return on_device(stream.ids.device, np.pad(np.array(places), (0, filling), mode="edge"))


class _FirstTokens(TorchFunctionMode):
    """Answers `hidden[:, 0]`, what encoders pool by, with the first token of every text.

    They take it for the first token of each row in a batch, be it in the body, in the head or
    between the two; but the stream is one row. `(1, T, H)` becomes `(M, H)`, where M is the number
    of texts filled up as the stream is, by repeating the last one.
    """

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self._firsts = _filled(stream, [text[0] for text in stream.texts])
        self._tokens = stream.ids.shape[1]

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.__getitem__:
            match args:
                case (
                    torch.Tensor(shape=(1, self._tokens, _)) as hidden,
                    (slice(start=None, stop=None), int(0), *rest),
                ):
                    return hidden[(0, self._firsts, *rest)]
        return func(*args, **(kwargs or {}))


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
    causal = module.is_causal if is_causal is None else is_causal
    attend = attend_in_graph if torch.compiler.is_compiling() else _attend
    score = (scaling, sliding_window, softcap, bool(causal))
    return attend(query, key, value, None, None, *score), None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cosines: torch.Tensor | None,
    sines: torch.Tensor | None,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    causal: bool,
) -> torch.Tensor:
    current = _current.get()
    attention = current.stream.attention
    if attention.causal != causal:
        raise ValueError("the stream was laid out for attention of the other kind")
    queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))
    score = Score(scaling, window, softcap)
    if cosines is None or sines is None:
        attended = attention.attend(queries, keys, values, score)
    else:
        assert isinstance(attention, Compiled)  # no other stands in graphs
        attended = attention.attend(queries, keys, values, score, (cosines[0, 0], sines[0, 0]))
    current.has_attended()
    return attended[None]


def _like_attended(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cosines: torch.Tensor | None,
    sines: torch.Tensor | None,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    causal: bool,
) -> torch.Tensor:
    _, heads, tokens, _ = query.shape
    return query.new_empty((1, tokens, heads, value.shape[3]))


attend_in_graph = define("attention", _attend, _like_attended)
"""Attention over the current stream as one operator. Takes queries, keys and values as `_attention`
does; cosines and sines, `(1, 1, T, D)`, where it is to turn queries and keys by them."""


def _no_mask(*_: Any, **__: Any) -> None:
    """The stream's attention makes its own masks."""


AttentionInterface.register(ATTENTION, torch.compiler.disable(_attention))
AttentionInterface.register(ATTENTION_IN_GRAPHS, _attention)
for name in (ATTENTION, ATTENTION_IN_GRAPHS):
    AttentionMaskInterface.register(name, _no_mask)
