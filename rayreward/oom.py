"""Goes on in halves when a device runs out of memory, and in whole batches again when it can.

Knows batches and a function that scores them; does not know models or text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import torch

from rayreward.batching import apart
from rayreward.types import Branch

_logger = logging.getLogger("rayreward")

_CALM_BATCHES = 32
"""Batches without trouble after which larger ones are tried again."""

Parts = list[torch.Tensor | None]
"""The rewards of a batch, part by part; null for a part of one text that does not fit."""


class Halving:
    """Scores batches in as few parts as memory allows.

    Where G3 holds, the parts give the bits that the whole would have given.
    """

    def __init__(self, rewards: Callable[[Sequence[Branch]], torch.Tensor]) -> None:
        """
        Args:
            rewards: A batch of N texts → `(N,)`, on any device.
        """
        self._rewards = rewards
        self._parts = 1
        self._calm = 0

    def __call__(self, batch: Sequence[Branch]) -> Parts:
        """Scores a batch. Does not wait for a GPU to be done with it; `read` does."""
        self._calm += 1
        if self._parts > 1 and self._calm > _CALM_BATCHES:
            self._parts, self._calm = self._parts // 2, 0
        parts = [batch]
        while len(parts) < self._parts and any(len(part) > 1 for part in parts):
            parts = [half for part in parts for half in _halves(part)]
        return [rewards for part in parts for rewards in self._score(part, len(parts))]

    def _score(self, part: Sequence[Branch], of: int) -> Parts:
        try:
            return [self._rewards(part)]
        except torch.OutOfMemoryError as error:
            message = str(error).splitlines()[0]
        # outside of the handler, whose traceback would keep the tensors alive
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(part) == 1:
            _logger.warning("a text does not fit into memory even alone: %s", message)
            return [None]
        _logger.warning("out of memory with %d texts; going on with half: %s", len(part), message)
        self._parts, self._calm = max(self._parts, of * 2), 0
        return [rewards for half in _halves(part) for rewards in self._score(half, of * 2)]


def read(parts: Parts) -> list[float | None]:
    """A reward for each text of a batch, in order; null for one that does not fit even alone."""
    found: list[float | None] = []
    for rewards in parts:
        found += [None] if rewards is None else rewards.tolist()
    return found


def _halves(part: Sequence[Branch]) -> Iterator[Sequence[Branch]]:
    """Two halves, in order; a single text stays whole."""
    middle = len(part) // 2
    if middle:
        yield part[:middle]
    yield apart(part[middle:])
