"""How many tokens a batch holds where the settings leave it open.

On a GPU that is found by a probe: a batch is run and its memory measured. Knows models and memory;
does not know text.
"""

from __future__ import annotations

import numpy as np
import torch

from rayreward.model import Layout, RewardModel
from rayreward.types import Branch

_CPU_TOKENS: dict[Layout, int] = {"flat": 8_192, "padded": 1_024, "single": 1_024}
"""Measured on two cores with a 135M model: half as many take a flat stream 2 to 4 % longer; eight
times as many take padded batches 80 % longer."""

_MOST_TOKENS = 16_384
"""More keeps no GPU busier: products of so many rows are as fast as they get."""

_FEWEST_TOKENS = 1_024

_PROBE_TEXTS, _PROBE_LENGTH = 8, 256

_FREE_SHARE = 0.7
"""Of the free memory; the rest is for gaps between blocks, and for whoever else is there."""


def find_budget(model: RewardModel) -> int:
    """Tokens in a batch, for a model on its device.

    A power of two, so that GPUs of one kind come to the same number although they are not equally
    free.
    """
    if model.device.type == "cpu":
        return _CPU_TOKENS[model.layout]
    torch.cuda.empty_cache()
    try:
        bytes_per_token = _measure(model)
    except torch.OutOfMemoryError:
        return _FEWEST_TOKENS
    return fitting(torch.cuda.mem_get_info(model.device)[0], bytes_per_token)


def fitting(free_bytes: float, bytes_per_token: float) -> int:
    """The largest power of two within bounds of which so much memory holds the activations."""
    tokens = _MOST_TOKENS
    while tokens > _FEWEST_TOKENS and tokens * bytes_per_token > _FREE_SHARE * free_bytes:
        tokens //= 2
    return tokens


def _measure(model: RewardModel) -> float:
    """Bytes of a GPU that one more token in a batch takes."""
    length = min(_PROBE_LENGTH, model.loaded.max_positions or _PROBE_LENGTH)
    draw = np.random.default_rng(0).integers(0, model.vocabulary, (_PROBE_TEXTS, length))
    batch = [Branch(tuple(text)) for text in draw.tolist()]
    model.rewards(batch)  # libraries take workspaces at their first call
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    model.rewards(batch)
    torch.cuda.synchronize(model.device)
    return (torch.cuda.max_memory_allocated(model.device) - before) / draw.size
