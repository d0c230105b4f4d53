"""What the GPU benchmark measures: shapes of models, how much of what, and the texts (`gpu`)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rayreward.batching import share_prefixes

SEED = 42
PAD_ID = 0
VOCABULARY = 32_000


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is measured."""

    device: torch.device
    shapes: dict[str, dict[str, int]]
    pairs: int
    prompts: int
    singles: int
    budgets: tuple[int, ...]
    """RayReward's tokens in a batch."""
    sizes: tuple[int, ...]
    """Texts in a batch of the loop."""
    repeats: int
    product: int
    """Rows and columns of the matrices by which the hardware is measured."""

    @property
    def middle(self) -> tuple[int, int]:
        """The budget and the batch size where only one is measured."""
        return self.budgets[len(self.budgets) // 2], self.sizes[len(self.sizes) // 2]


def shape(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
    }


FULL = Scale(
    device=torch.device("cuda:0"),
    shapes={
        "135M": shape(576, 30, 9, 3, 1_536),
        "0.6B": shape(1_024, 28, 16, 8, 3_072),
        "1B": shape(2_048, 16, 32, 8, 8_192),
        "8B": shape(4_096, 32, 32, 8, 14_336),
    },
    pairs=128,
    prompts=16,
    singles=32,
    budgets=(8_192, 16_384, 32_768),
    sizes=(8, 32, 64),
    repeats=3,
    product=8_192,
)
SMOKE = Scale(
    device=torch.device("cpu"),
    shapes={"tiny": shape(64, 2, 4, 2, 128)},
    pairs=4,
    prompts=1,
    singles=2,
    budgets=(512, 1_024, 2_048),
    sizes=(2, 4, 8),
    repeats=1,
    product=128,
)
SMALL = shape(256, 4, 8, 2, 512)
"""For what is compared in float32."""


Texts = list[tuple[int, ...]]


def draw_pairs(count: int) -> Texts:
    dice = np.random.default_rng(SEED)
    prefixes = dice.lognormal(np.log(105), 0.65, count)
    branches = np.clip(dice.lognormal(np.log(38), 0.75, (count, 2)), 8, 300).astype(int)
    least, most = 60 - branches.min(axis=1), 500 - branches.max(axis=1)
    prefixes = np.clip(prefixes, np.maximum(12, least), np.minimum(420, most)).astype(int)
    return [text for p, b in zip(prefixes, branches, strict=True) for text in draw(dice, p, b)]


def draw_completions(prompts: int) -> Texts:
    dice = np.random.default_rng(SEED)
    return [text for _ in range(prompts) for text in draw(dice, 512, [64] * 8)]


def draw_singles(count: int) -> Texts:
    dice = np.random.default_rng(SEED)
    return [text for _ in range(count) for text in draw(dice, 0, [1_024])]


def draw(dice: np.random.Generator, prefix: int, branches: Sequence[int]) -> Texts:
    """Texts that begin alike."""
    first, *others = (tuple(dice.integers(3, VOCABULARY, n).tolist()) for n in (prefix, *branches))
    return [first + other for other in others]


def workloads(scale: Scale) -> dict[str, Texts]:
    return {
        "pairs": draw_pairs(scale.pairs),
        "completions": draw_completions(scale.prompts),
        "singles": draw_singles(scale.singles),
    }


def describe(texts: Texts) -> dict[str, Any]:
    lengths = [len(text) for text in texts]
    spared = sum(branch.shared for branch in share_prefixes(sorted(texts)))
    return {
        "texts": len(lengths),
        "tokens": sum(lengths),
        "shortest": min(lengths),
        "mean": round(statistics.mean(lengths)),
        "longest": max(lengths),
        "shareable": round(spared / sum(lengths), 3),
    }
