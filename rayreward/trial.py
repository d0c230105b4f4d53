"""What a model is tried with at load, and how close to its own a way of running it must be.

Knows batches of token ids and states; does not know the ways that are tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from rayreward.batching import share_prefixes
from rayreward.types import Branch

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""How far, relative to its length, a hidden state may be from transformers' own: well above what
another order of summation does, well below what attending to the wrong tokens does."""


def draw_batch(vocabulary: int, max_positions: int | None, least: int) -> list[Branch]:
    """Texts of made-up tokens: alone, sharing a prefix and a longer one, more than a block long.

    Few, since a large model on slow cores takes seconds for a hundred tokens, before its first
    reward; but more tokens than the smallest stream has, or nothing would be narrowed in it.

    Args:
        vocabulary: How many token ids there are.
        max_positions: The most tokens of a text; null for any number.
        least: Tokens in the smallest stream.
    """
    generator = np.random.default_rng(0)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(generator.integers(0, vocabulary, length).tolist())

    longest = min(70, max_positions or 70)
    start, prompt = draw(longest // 7), draw(longest // 7 * 2)
    return share_prefixes(
        [
            draw(1),
            start + draw(3),
            start + prompt,
            start + prompt + draw(longest // 7 * 4),
            *(draw(longest) for _ in range(least // longest)),
        ]
    )


@torch.inference_mode()
def tried(
    way: Callable[[Sequence[Branch]], torch.Tensor], batch: Sequence[Branch]
) -> torch.Tensor | None:
    """What reaches the head, `(N, H)`; null where the model can't run this way."""
    try:
        return way(batch)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return None


def is_close(ours: torch.Tensor | None, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether all texts' states are near what they should be, for a body in this precision.

    Those that should be no numbers have to be none.
    """
    if ours is None or ours.shape != expected.shape:
        return False
    error = (ours.float() - expected).norm(dim=1) / expected.norm(dim=1)
    neither_finite = ~(ours.isfinite().all(dim=1) | expected.isfinite().all(dim=1))
    return bool(((error <= _TOLERANCE[dtype]) | neither_finite).all())
