"""How transformers counts a text's positions, and which of them a reward comes from.

Knows token ids and embeddings; does not know streams or batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from torch import nn


def position_padding(module: nn.Module) -> int | None:
    """The padding index of the position embeddings: null in all but RoBERTa and its kin."""
    for name, child in module.named_modules():
        if name.endswith("position_embeddings") and isinstance(child, nn.Embedding):
            return child.padding_idx
    return None


def pooled_position(ids: Sequence[int], pad_id: int) -> int:
    """The position whose hidden state becomes the reward: the rightmost token that is no padding.

    It goes by the id, not by the mask, so a trailing EOS is looked past where it doubles as
    padding. Source: transformers' GenericForSequenceClassification.forward, whose argmax also
    gives 0 for a text of nothing but padding.
    """
    return next((at for at in range(len(ids) - 1, -1, -1) if ids[at] != pad_id), 0)


def token_positions(text: Sequence[int], padding_idx: int | None) -> Sequence[int]:
    """The positions of a text's tokens, from 0.

    RoBERTa and its kin have a position for padding, wherever it stands, and count the other tokens
    from the next one. Source: transformers' RobertaEmbeddings.create_position_ids_from_input_ids.
    """
    if padding_idx is None:
        return range(len(text))
    counted = [token != padding_idx for token in text]
    numbers = accumulate(counted)
    return [padding_idx + number * count for number, count in zip(numbers, counted, strict=True)]
