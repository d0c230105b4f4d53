"""Cuts sequences into groups and batches under a token budget. Integers in, integers out.

The cut depends on the lengths and the budget alone, never on who is free or what came before.
Does not know torch, Ray or files.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from rayreward.types import Group

_WORTH_SHARING = 8
"""Tokens. Texts with fewer in common, such as the one that all begin with, are computed apart."""


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


def share_prefixes(texts: Iterable[tuple[int, ...]]) -> list[Group]:
    """Groups texts that begin alike, so that few tokens are left to compute.

    Args:
        texts: Token ids, each text once, in any order.

    Returns:
        Groups of neighbours in the order of their ids; each text is in one of them.
    """
    ordered = sorted(texts)
    common = [_common(*pair) for pair in pairwise(ordered)]
    runs = [_Run(at, at, 0) for at in range(len(ordered))]  # that a text is the first or last of
    groups: list[_Run] = []
    # from the longest common start down: whatever lies within a run has more in common
    for border in sorted(range(len(common)), key=lambda at: -common[at]):
        left, right = runs[border], runs[border + 1]
        apart, together = left.saved + right.saved, common[border] * (right.last - left.first)
        run = _Run(left.first, right.last, max(apart, together))
        if together > apart:
            groups.append(run)
        runs[run.first] = runs[run.last] = run
    shared, at = [], 0
    widest = {run.first: run for run in groups}  # later ones hold earlier ones
    while at < len(ordered):
        run = widest.get(at, _Run(at, at, 0))
        shared.append(_share(ordered[at : run.last + 1]))
        at = run.last + 1
    return shared


class _Run(NamedTuple):
    """Neighbours, from the first to the last, and the tokens that grouping them saves."""

    first: int
    last: int
    saved: int


def _share(texts: Sequence[tuple[int, ...]]) -> Group:
    """One group of texts in order."""
    shared = _common(texts[0], texts[-1]) if len(texts) > 1 else 0
    return Group(texts[0][:shared], tuple(text[shared:] for text in texts))


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Tokens that both begin with; none where they are too few to be worth it."""
    fewer = min(len(a), len(b))
    found = bisect_left(range(1, fewer + 1), True, key=lambda n: a[:n] != b[:n])
    return found if found >= _WORTH_SHARING else 0


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
