"""How much of the time a model worked. Knows clocks; does not know what a model is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(slots=True)
class ModelTime:
    """When a model began to work, when it was last done, and how long it worked in between.

    Attributes:
        began_s: When its first batch began, in seconds since 1970; infinite before.
        ended_s: When its last batch ended; minus infinity before.
        busy_s: How long batches took, one after the other.
    """

    began_s: float = math.inf
    ended_s: float = -math.inf
    busy_s: float = 0.0

    @contextmanager
    def running(self, clock: Callable[[], float] = time.time) -> Iterator[None]:
        """Counts what happens inside as work."""
        start = clock()
        self.began_s = min(self.began_s, start)
        yield
        self.ended_s = clock()
        self.busy_s += self.ended_s - start

    def __add__(self, other: ModelTime) -> ModelTime:
        return ModelTime(
            min(self.began_s, other.began_s),
            max(self.ended_s, other.ended_s),
            self.busy_s + other.busy_s,
        )

    def busy_share(self, models: int) -> float | None:
        """The share of the time between first and last batch that so many models worked."""
        span = self.ended_s - self.began_s
        return min(self.busy_s / (span * models), 1.0) if span > 0 else None
