"""Attention by variable-length kernels for GPUs: torch's own, and flash-attn's for soft caps."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # as everybody calls it
from torch.nn.attention.varlen import varlen_attn

from rayreward.attention.base import Index, Score, on_device


class Spans:
    """Attention by variable-length kernels, for GPUs. Implements `Attention`.

    Each text is a span of queries, those tokens that it is the one to compute, and a span of keys,
    all of its tokens. The kernels line a shorter span of queries up with the end of its keys.
    Queries are spans of the stream as it is; keys are gathered where texts share some.
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
        self.calls = 0
        owned = zip(texts, owned_from, strict=True)
        spans = [(text[first:], text) for text, first in owned if len(text) > first]
        query_lengths, key_lengths = ([len(s[i]) for s in spans] for i in (0, 1))
        self._tokens = sum(query_lengths)
        shares = sum(key_lengths) > self._tokens
        self._keys = (
            on_device(device, np.concatenate([keys for _, keys in spans]))
            if shares
            else slice(self._tokens)
        )
        self._lengths = (
            on_device(device, np.cumsum([0, *query_lengths], dtype=np.int32)),
            on_device(device, np.cumsum([0, *key_lengths], dtype=np.int32)),
            max(query_lengths),
            max(key_lengths),
        )

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, score: Score
    ) -> torch.Tensor:
        """As in `Attention`.

        Raises:
            ValueError: The scores are capped, and flash-attn is not there to do it.
        """
        self.calls += 1
        back = -1 if score.window is None else score.window - 1
        # said even where causal says it: with an open window flash-attn splits keys, by the longest
        # text, where no text has more than one query
        window = (back, 0 if self.causal else back)
        spans = (queries[: self._tokens], keys[self._keys], values[self._keys], *self._lengths)
        attended: Any
        if score.softcap is None:
            attended = varlen_attn(
                *spans, scale=score.scaling, window_size=window, **_varlen_options()
            )
        else:
            attended = _flash_attn()(
                *spans,
                softmax_scale=score.scaling,
                causal=self.causal,
                window_size=window,
                softcap=score.softcap,
            )
        filling = len(queries) - self._tokens
        return F.pad(attended, (0, 0, 0, 0, 0, filling)) if filling else attended


@cache
def _varlen_options() -> dict[str, Any]:
    """Fewer heads of keys are allowed; keys are not split, which would go by the longest text.

    Before torch had these options, it did both unasked. From 2.14 on it would take cuDNN's kernel
    for some batches, by their longest text, but for none whose keys may not be split.
    """
    known = inspect.signature(varlen_attn).parameters
    return {k: v for k, v in {"enable_gqa": True, "num_splits": 1}.items() if k in known}


@cache
def _flash_attn() -> Any:
    """flash-attn's variable-length kernel, of which torch's is a copy without soft caps.

    Source: flash_attn_varlen_func and mha_varlen_fwd of flash-attn 2.6 and later.

    Raises:
        ValueError: It is not installed, or not for this torch.
    """
    try:
        return import_module("flash_attn").flash_attn_varlen_func
    except (ImportError, OSError, AttributeError) as error:
        raise ValueError(f"torch's variable-length kernel has no soft cap: {error}") from error
