"""batching: every sequence once, no batch over the budget, the same cut every time."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayreward.batching import make_batches, pack_branches, share_prefixes
from rayreward.types import Branch

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


def _tokens(batch: Sequence[Branch]) -> int:
    return sum(branch.own for branch in batch)


def _beginnings(texts: Iterable[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """All that the texts begin with, themselves included: what is left to compute, each once."""
    return {text[:length] for text in texts for length in range(1, len(text) + 1)}


@QUICK
@given(texts=st.lists(TOKENS, max_size=8))
def test_sharing_finds_all_that_a_text_has_in_common_with_the_one_before(
    texts: list[tuple[int, ...]],
) -> None:
    branches = share_prefixes(texts)
    assert [branch.ids for branch in branches] == texts
    for before, branch in itertools.pairwise(branches):
        in_common = _beginnings([before.ids]) & _beginnings([branch.ids])
        assert branch.shared == len(in_common)


@QUICK
@given(texts=st.sets(TOKENS, max_size=8))
def test_sorted_texts_are_computed_once_wherever_they_begin_alike(
    texts: set[tuple[int, ...]],
) -> None:
    assert _tokens(share_prefixes(sorted(texts))) == len(_beginnings(texts))


def test_completions_share_a_prompt_and_prompts_a_system_prompt() -> None:
    system = tuple(range(20))
    a, b = (*system, *range(100, 200)), (*system, *range(200, 300))
    branches = share_prefixes(sorted([(*a, 1), (*b, 1), (*a, 2), (*b, 2), (*a, 3)]))
    assert [branch.shared for branch in branches] == [0, 120, 120, 20, 120]


def test_what_is_not_worth_sharing_is_computed_apart() -> None:
    texts = [(1, 2, 3, 4), (1, 2, 5, 6)]
    assert [branch.shared for branch in share_prefixes(texts, worth_sharing=2)] == [0, 2]
    assert share_prefixes(texts, worth_sharing=3) == [Branch(text) for text in texts]


@QUICK
@given(texts=st.lists(TOKENS, max_size=12), budget=st.integers(1, 30), ordered=st.booleans())
def test_packing_holds_each_text_once_within_the_budget(
    texts: list[tuple[int, ...]], budget: int, ordered: bool
) -> None:
    branches = share_prefixes(sorted(texts) if ordered else texts)
    batches = pack_branches(branches, budget)
    assert [branch.ids for batch in batches for branch in batch] == [b.ids for b in branches]
    assert all(len(batch) == 1 or _tokens(batch) <= budget for batch in batches)
    for batch in batches:
        assert batch == share_prefixes([branch.ids for branch in batch])


def test_completions_over_the_budget_are_split_and_each_batch_has_the_prompt() -> None:
    prompt = tuple(range(512))
    texts = [prompt + (1_000 + n,) * 64 for n in range(64)]
    batches = pack_branches(share_prefixes(texts), 1_024)
    assert [len(batch) for batch in batches] == [8] * 8
    assert [_tokens(batch) for batch in batches] == [1_024] * 8


def test_a_batch_ends_between_pairs_rather_than_within_one() -> None:
    """Though the first of the third pair would have had room."""
    pairs = [(pair,) * 50 + (100 + side,) * 10 for pair in range(4) for side in range(2)]
    batches = pack_branches(share_prefixes(pairs), 205)
    assert [len(batch) for batch in batches] == [4, 4]


def test_a_text_over_the_budget_is_a_batch_of_its_own() -> None:
    texts = [(1,) * 5, (2,) * 40, (2,) * 41, (3,) * 5, (4,) * 5]
    assert [len(batch) for batch in pack_branches(share_prefixes(texts), 20)] == [1, 1, 1, 2]


def test_texts_that_share_nothing_fill_their_batches() -> None:
    branches = [Branch((n,) * 10) for n in range(9)]
    assert [len(batch) for batch in pack_branches(branches, 45)] == [4, 4, 1]
