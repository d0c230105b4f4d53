"""Attention over a flat stream: the only place that knows where a text begins and ends.

There are three ways to compute it, a module each: `compiled`, our own kernel for CPUs; `spans`,
variable-length kernels for GPUs; `blocks`, what torch has everywhere. Each keeps a token's
bits whatever shares the batch; the trial at load (`rayreward.model`) says which are right here.

Knows torch; does not know models, heads or how a batch was chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch

from rayreward.attention.base import Attention, Index, Score, on_device
from rayreward.attention.blocks import Blocks
from rayreward.attention.compiled import Compiled
from rayreward.attention.spans import Spans

__all__ = ["Attention", "Compiled", "Index", "Kernel", "Score", "make_attention", "on_device"]

Kernel = Literal["compiled", "varlen", "blocks"]


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
            comes before is shared with an earlier text. Those tokens of all texts, one text after
            the other, are the stream from its first token on.
        device: Where the stream is.
        causal: Whether a token sees those before it only, or all of its text.
    """
    kinds: dict[Kernel, Callable[..., Attention]] = {
        "compiled": Compiled,
        "varlen": Spans,
        "blocks": Blocks,
    }
    return kinds[kernel](texts, owned_from, device, causal=causal)
