"""batching: every sequence once, no batch over the budget, the same cut every time."""

from __future__ import annotations

import itertools
import os
import random
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayreward import batching
from rayreward.batching import make_batches, share_prefixes
from rayreward.types import Group

LENGTHS = st.lists(st.integers(min_value=1, max_value=64), max_size=48)
BUDGET = st.integers(min_value=1, max_value=256)
QUICK = settings(max_examples=150, deadline=None, database=None, derandomize=True)


def _cost(lengths: list[int], batch: list[int]) -> int:
    return max(lengths[index] for index in batch) * len(batch)


@QUICK
@given(lengths=LENGTHS, budget=BUDGET)
def test_batching_holds_each_index_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = make_batches(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or _cost(lengths, batch) <= budget for batch in batches)


@QUICK
@given(lengths=LENGTHS, budget=BUDGET)
def test_batching_leaves_no_room_unused(lengths: list[int], budget: int) -> None:
    batches = make_batches(lengths, budget)
    for batch, following in itertools.pairwise(batches):
        assert _cost(lengths, [*batch, following[0]]) > budget


@QUICK
@given(lengths=LENGTHS, budget=BUDGET, seed=st.integers(min_value=0, max_value=9))
def test_batching_cuts_alike_in_any_order(lengths: list[int], budget: int, seed: int) -> None:
    shuffled = random.Random(seed).sample(lengths, len(lengths))
    cut, other = (
        [[given[index] for index in batch] for batch in make_batches(given, budget)]
        for given in (lengths, shuffled)
    )
    assert cut == other


def test_batching_counts_padding_against_the_budget() -> None:
    assert make_batches([6, 1, 1], 12) == [[0, 1], [2]]
    assert make_batches([6, 1, 1], 18) == [[0, 1, 2]]
    assert make_batches([6, 1, 1], 17) == [[0, 1], [2]]


def test_batching_gives_an_overlong_sequence_its_own_batch() -> None:
    assert make_batches([3, 9, 3, 11], 8) == [[3], [1], [0, 2]]
    assert make_batches([9], 1) == [[0]]


def test_batching_begins_with_the_longest() -> None:
    assert make_batches([2, 5, 3, 4], 10) == [[1, 3], [2, 0]]


def test_batching_keeps_the_order_of_equal_lengths() -> None:
    assert make_batches([4, 7, 4, 7, 4], 14) == [[1, 3], [0, 2, 4]]


def test_batching_is_deterministic() -> None:
    lengths = [random.Random(0).randint(1, 512) for _ in range(300)]
    first = make_batches(lengths, 2048)
    assert all(make_batches(tuple(lengths), 2048) == first for _ in range(3))


@pytest.mark.parametrize("budget", [1, 2048])
def test_batching_of_nothing_is_nothing(budget: int) -> None:
    assert make_batches([], budget) == []


TOKENS = st.lists(st.integers(min_value=1, max_value=2), min_size=1, max_size=12).map(tuple)


def _tokens(group: Group) -> int:
    return len(group.prefix) + sum(map(len, group.branches))


@QUICK
@given(texts=st.sets(TOKENS, max_size=8))
def test_sharing_holds_each_text_once_and_leaves_few_tokens(texts: set[tuple[int, ...]]) -> None:
    with patch.object(batching, "_WORTH_SHARING", 1):
        groups = share_prefixes(texts)
    ordered = sorted(texts)
    assert [text for group in groups for text in group.texts] == ordered
    left = sum(map(_tokens, groups))
    assert left <= sum(map(len, ordered))
    assert not ordered or left <= _one_group(ordered)


def _one_group(texts: list[tuple[int, ...]]) -> int:
    shared = len(os.path.commonprefix(texts))  # noqa: RUF071 - of any sequences
    return shared + sum(len(text) - shared for text in texts)


def test_sharing_finds_completions_of_a_prompt_wherever_they_stand() -> None:
    system = tuple(range(20))
    a, b = (*system, *range(100, 200)), (*system, *range(200, 300))
    texts = [(*a, 1), (*b, 1), (*a, 2), (*b, 2), (*a, 3)]
    found = {group.prefix: sorted(group.branches) for group in share_prefixes(texts)}
    assert found == {a: [(1,), (2,), (3,)], b: [(1,), (2,)]}


def test_sharing_leaves_a_few_tokens_in_common_alone() -> None:
    groups = share_prefixes([(1, 2, 3, 4), (1, 2, 5, 6)])
    assert groups == [Group((), ((1, 2, 3, 4),)), Group((), ((1, 2, 5, 6),))]
