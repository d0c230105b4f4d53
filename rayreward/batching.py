"""Cuts sequences into groups and batches under a token budget. Integers in, integers out.

The cut depends on the lengths and the budget alone, never on who is free or what came before.
Does not know torch, Ray or files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile

from rayreward.types import Group


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


def share_prefix(texts: Sequence[tuple[int, ...]]) -> Group:
    """Makes a group of texts: their longest common start, and what is left of each."""
    first, last = min(texts), max(texts)  # what these two have in common, all have
    pairs = zip(first, last, strict=False)
    prefix = first[: sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))]
    return Group(prefix, tuple(text[len(prefix) :] for text in texts))


def pack_groups(
    groups: Sequence[tuple[int, Sequence[int]]], max_batch_tokens: int
) -> list[list[tuple[int, range]]]:
    """Fills batches with groups, in their order, each prefix counted once.

    A group over the budget is split into several, each with the prefix and some of its branches; a
    single branch over the budget is a batch of its own.

    Args:
        groups: For each group the length of its prefix and the lengths of its branches, in tokens.
        max_batch_tokens: The most that a batch may hold.

    Returns:
        Batches of (group, which of its branches).
    """
    batches: list[list[tuple[int, range]]] = []
    room = 0
    for index, (prefix, branches) in enumerate(groups):
        for chosen in _split(prefix, branches, max_batch_tokens):
            cost = prefix + sum(branches[branch] for branch in chosen)
            if not batches or cost > room:
                batches.append([])
                room = max_batch_tokens
            batches[-1].append((index, chosen))
            room -= cost
    return batches


def _split(prefix: int, branches: Sequence[int], max_batch_tokens: int) -> Iterator[range]:
    start, cost = 0, prefix
    for index, branch in enumerate(branches):
        if index > start and cost + branch > max_batch_tokens:
            yield range(start, index)
            start, cost = index, prefix
        cost += branch
    yield range(start, len(branches))
