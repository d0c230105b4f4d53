"""G3, no neighbours: finds out whether a loaded model's rewards keep their bits in other company.

Promised by construction for the flat stream on a CPU and for texts run one at a time, but kernels
differ between processors and versions: so it is tried, on the hardware at hand, whenever a model is
loaded. On a GPU, whose kernels go by the number of rows, every size of a stream is tried; on a CPU
some are, where weights are in plain order, since kernels for those may do so, too.

Knows batches of token ids; does not know text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from rayreward.batching import share_prefixes
from rayreward.config import ModelConfig
from rayreward.errors import ModelError
from rayreward.model import RewardModel
from rayreward.sizes import Sizes
from rayreward.types import Branch

_CROWD = 6
"""Times as many texts, of one token each: more than what numbers of texts are filled up to."""

_CROWD_LENGTH = 8
"""Tokens in a text of the crowds that fill a stream: as many texts as there will be in practice."""

_SOME_SIZES = tuple(2**power for power in range(3, 11))
"""Tokens of the streams that are tried on a CPU: 2,040 in all."""


def settle_invariance(model: RewardModel, config: ModelConfig, max_batch_tokens: int) -> str:
    """Tries G3, and takes what keeps it where the settings insist on it.

    That is a flat stream that always has the same number of tokens, so that no kernel ever sees
    another shape, or else one text at a time.

    Returns:
        The verdict, in words.

    Raises:
        ModelError: `batch_invariant=True`, and even one text at a time does not keep its bits.
    """
    if config.batch_invariant is False:
        return "not tried"
    moved_by = find_dependence(model, max_batch_tokens)
    if moved_by and config.batch_invariant is True and model.layout == "flat":
        model.sizes = Sizes(max_batch_tokens)
        moved_by = find_dependence(model, max_batch_tokens)
    if moved_by and config.batch_invariant is True:
        model.layout = "single"
        moved_by = find_dependence(model, max_batch_tokens)
        if moved_by:
            raise ModelError(
                f"Rewards of {config.model!r} change on this hardware {' and '.join(moved_by)}, "
                "even one text at a time, and batch_invariant=True insists that they don't. Leave "
                "it at 'auto' to score all the same."
            )
    return f"does not hold {', nor '.join(moved_by)}" if moved_by else "holds"


def find_dependence(model: RewardModel, max_batch_tokens: int) -> tuple[str, ...]:
    """Compares texts bitwise: alone, and behind a crowd with their prefixes shared.

    By the states that rewards are made of: in the one number that a reward is, bits that have moved
    often come to the same.

    On a GPU behind crowds of all sizes, on a CPU of some where weights are in plain order. Padded
    batches are not tried: some texts keep their bits there by luck, and others do not.

    Args:
        model: Whose rewards.
        max_batch_tokens: Tokens in the largest batch.

    Returns:
        The changes of company that moved a bit; none where G3 holds.
    """
    if model.layout == "padded":
        return ("in padded batches",)
    texts = [branch.ids for branch in reversed(model.trial_batch())]
    apart = [Branch(text) for text in texts]
    shared = share_prefixes(texts) if model.layout == "flat" else apart
    alone = torch.cat([model.states([branch]) for branch in apart])
    crowds = list(_crowds(model, texts, max_batch_tokens))

    def moves(branches: list[Branch], behind: list[list[Branch]]) -> bool:
        found = (model.states(crowd + branches)[len(crowd) :] for crowd in behind)
        try:
            return any(not torch.equal(states, alone) for states in found)
        except torch.OutOfMemoryError:
            return False  # such batches go in halves, and larger ones too

    if not moves(shared, crowds):
        return ()
    changes = {
        "in other company": moves(apart, crowds),
        "with a shared prefix": moves(shared, [[]]),
    }
    return tuple(name for name, moved in changes.items() if moved) or tuple(changes)


def _crowds(
    model: RewardModel, texts: Sequence[tuple[int, ...]], max_batch_tokens: int
) -> Iterator[list[Branch]]:
    """Crowds for some texts: of their first tokens, and one for each size of stream to try."""
    yield [Branch(text[:1]) for text in texts] * _CROWD
    beside, draw = sum(map(len, texts)), np.random.default_rng(1)
    for size in _sizes(model, max_batch_tokens):
        tokens = draw.integers(0, model.vocabulary, max(0, size - beside)).tolist()
        cuts = range(0, len(tokens), _CROWD_LENGTH)
        yield [Branch(tuple(tokens[cut : cut + _CROWD_LENGTH])) for cut in cuts]


def _sizes(model: RewardModel, max_batch_tokens: int) -> Iterable[int]:
    """Tokens of the streams to try: all that there will be on a GPU, some for plain weights."""
    if model.layout != "flat":
        return ()
    if model.device.type == "cuda":
        return model.sizes.up_to(max_batch_tokens)
    some = _SOME_SIZES if model.has_plain_weights else ()
    return sorted({min(model.sizes.filled(size), max_batch_tokens) for size in some})
