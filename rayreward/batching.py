"""Cuts sequences into batches under a token budget. Integers in, integers out.

The cut depends on the lengths and the budget alone, never on who is free or what came before.
Does not know torch, Ray or files.
"""

from __future__ import annotations

from collections.abc import Sequence


def make_batches(lengths: Sequence[int], max_batch_tokens: int) -> list[list[int]]:
    """Groups sequences of like length, longest first.

    A batch costs its longest sequence times its rows, since every row is padded to the longest.
    A sequence over the budget is a batch of its own.

    Args:
        lengths: Tokens of each sequence.
        max_batch_tokens: The most that a batch may cost, padding included.

    Returns:
        Indices into `lengths`, each exactly once. Equal lengths keep their order.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batches: list[list[int]] = []
    for index in order:
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= max_batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
