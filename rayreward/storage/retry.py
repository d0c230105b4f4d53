"""Trying again what failed in passing."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from rayreward.storage.failures import passing

_T = TypeVar("_T")


@dataclass(frozen=True)
class Retry:
    """Tries again what failed in passing, after a random part of a wait that doubles each time.

    Full jitter, as in "Exponential Backoff And Jitter" (AWS Architecture Blog, 2015).
    """

    attempts: int = 6
    first_s: float = 0.5
    longest_s: float = 20.0
    sleep: Callable[[float], None] = time.sleep
    draw: Callable[[], float] = random.random

    def __call__(self, work: Callable[[], _T]) -> _T:
        """Does the work, and returns what it returns.

        Raises:
            Exception: As the work raised it, the last time or for good.
        """
        for tried in range(self.attempts - 1):
            try:
                return work()
            except Exception as error:
                if not passing(error):
                    raise
            self.sleep(self.draw() * min(self.longest_s, self.first_s * 2**tried))
        return work()


def once(work: Callable[[], _T]) -> _T:
    """For a library that tries again by itself."""
    return work()
