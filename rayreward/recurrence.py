"""Layers that carry a state from token to token, over a flat stream: gated delta rules.

Some decoders have such layers in the place of most attention (Qwen3-Next, Qwen3.5):
a short causal convolution, and a state for each head that every token decays and writes to. In a
stream each text begins with a state of zeros, or with the one that the tokens it shares have left
behind. On a CPU only, by kernels of our own: transformers' own functions know rows of a batch.

transformers has no interface for them as it has for attention. It calls two functions by name, in
the module that defines the layer. Those get a way in here, which does nothing outside of a pass
over a stream.

Knows those functions and the kernels; does not know what else a stream is.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers.activations import ACT2FN

from rayreward.native import Kernels, find_kernels

_CONVOLUTION, _RULE = "causal_conv1d_fn", "torch_chunk_gated_delta_rule"
"""Source: `transformers.models.qwen3_next.modeling_qwen3_next` and its like."""

_CONTINUED, _ZEROS, _NOT_KEPT = -2, -1, -1
"""Source: `native/recurrence.h`."""


@dataclass(frozen=True)
class Chains:
    """Which token follows which in a stream.

    Attributes:
        texts: For each text, the places of its tokens.
        owned_from: For each, how many of them it shares with the one before it.
    """

    texts: Sequence[NDArray[np.int64]]
    owned_from: Sequence[int]
    _before: dict[int, NDArray[np.int32]] = field(default_factory=dict, init=False)

    @cached_property
    def tokens(self) -> int:
        """How many there are in the stream."""
        return sum(map(len, self.texts)) - sum(self.owned_from)

    def before(self, size: int) -> NDArray[np.int32]:
        """`(T, size)`: for each token the places of as many, up to itself; -1 where none is."""
        if size not in self._before:
            self._before[size] = self._find_before(size)
        return self._before[size]

    def _find_before(self, size: int) -> NDArray[np.int32]:
        places = np.full((self.tokens, size), -1, dtype=np.int32)
        for text, first in zip(self.texts, self.owned_from, strict=True):
            for back in range(min(size, len(text))):
                own = np.arange(max(first, back), len(text))
                places[text[own], size - 1 - back] = text[own - back]
        return places

    @cached_property
    def states(self) -> tuple[NDArray[np.int32], NDArray[np.int32], int]:
        """For each token where its state comes from, where it is kept, and how many slots it takes.

        What a text shares is the start of the one before it, so what has to be kept is a stack.
        """
        pairs = list(zip(self.texts, self.owned_from, strict=True))
        kept = {int(text[first - 1]) for text, first in pairs if first}
        from_ = np.full(self.tokens, _CONTINUED, dtype=np.int32)
        into = np.full(self.tokens, _NOT_KEPT, dtype=np.int32)
        lengths: list[int] = []
        slots = 0
        for text, first in pairs:
            while lengths and lengths[-1] > first:
                lengths.pop()
            if first < len(text):
                from_[text[first]] = len(lengths) - 1 if first else _ZEROS
            for length in range(first + 1, len(text) + 1):
                place = int(text[length - 1])
                if place in kept:
                    into[place] = len(lengths)
                    lengths.append(length)
            slots = max(slots, len(lengths))
        return from_, into, slots


def follow_streams(module: nn.Module, current: Callable[[], Chains | None]) -> bool:
    """Lets layers of these kinds run over streams.

    Args:
        module: A model.
        current: What there is a pass over; null outside of one.

    Returns:
        Whether there are any.
    """
    has_any = False
    defined_in = {type(layer).__module__ for layer in module.modules()}
    for namespace in (vars(sys.modules[name]) for name in defined_in & sys.modules.keys()):
        if {_CONVOLUTION, _RULE} <= namespace.keys():
            has_any = True
            for name, ours in ((_CONVOLUTION, _convolve), (_RULE, _apply_rule)):
                if not hasattr(namespace[name], "follows_streams"):
                    namespace[name] = _following(namespace[name], ours, current)
    return has_any


def _following(
    own: Callable[..., Any], ours: Callable[..., Any], current: Callable[[], Chains | None]
) -> Callable[..., Any]:
    @functools.wraps(own)
    def either(*arguments: Any, **settings: Any) -> Any:
        # a graph can't hold a pass; one that somebody else compiles stays whole
        chains = None if torch.compiler.is_compiling() else current()
        if chains is None:
            return own(*arguments, **settings)
        return ours(chains, *arguments, **settings)

    either.follows_streams = True  # type: ignore[attr-defined]
    return either


def _convolve(
    chains: Chains,
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **others: Any,
) -> torch.Tensor:
    """`(1, channels, T)` by `(channels, size)` to `(1, channels, T)`."""
    kernels = _kernels(chains, hidden_states, hidden_states.shape[2])
    rows = hidden_states[0].t().float().contiguous()
    by = weight.t().float().contiguous()
    plus = None if bias is None else bias.float().contiguous()
    before = chains.before(len(by))
    results = torch.empty_like(rows)
    kernels.convolution(
        rows.data_ptr(),
        by.data_ptr(),
        None if plus is None else plus.data_ptr(),
        results.data_ptr(),
        before.ctypes.data,
        *rows.shape,
        len(by),
        torch.get_num_threads(),
    )
    results = results.to(weight.dtype)
    if activation is not None:
        results = ACT2FN[activation](results)
    return results.to(hidden_states.dtype).t()[None]


def _apply_rule(
    chains: Chains,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """`(1, T, key heads, keys)` twice and `(1, T, heads, values)` to the latter."""
    kernels = _kernels(chains, value, value.shape[1])
    if initial_state is not None or output_final_state:
        raise ValueError("a stream's texts begin with a state of their own")
    _, tokens, key_heads, key_size = key.shape
    heads, value_size = value.shape[2:]
    queries, keys, values, decays, betas = (
        x[0].float().contiguous() for x in (query, key, value, g, beta)
    )
    from_, into, slots = chains.states
    results = torch.empty_like(values)
    shape = np.array([tokens, key_heads, heads, key_size, value_size, slots], dtype=np.int64)
    kernels.recurrence(
        *(x.data_ptr() for x in (queries, keys, values, decays, betas, results)),
        *(x.ctypes.data for x in (from_, into, shape)),
        use_qk_l2norm_in_kernel,
        key_size**-0.5,
        torch.get_num_threads(),
    )
    return results[None].to(query.dtype), None


def _kernels(chains: Chains, tensor: torch.Tensor, tokens: int) -> Kernels:
    kernels = find_kernels()
    if tensor.device.type != "cpu" or not isinstance(kernels, Kernels):
        raise ValueError("states follow a stream on a CPU only, by kernels of our own")
    if tokens != chains.tokens:
        raise ValueError(f"{tokens} tokens are not the stream's {chains.tokens}")
    return kernels
