"""When a working actor looks at its weights again. Knows clocks; does not know what a look is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Recheck:
    """Spaces looks out so that they take a bounded share of the time.

    A look that took 0.1 s is due again after 20 s where the share is 0.005. So the cost is bounded
    whatever the model's size and the device, and nothing has to be tuned.
    """

    def __init__(self, share: float, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            share: The most of the time that looks may take; 0 for no looks at all.
            clock: Seconds, for tests.
        """
        self._share = share
        self._clock = clock
        self._last_s = 0.0
        self._took_s = 0.0

    @property
    def due(self) -> bool:
        """Whether it is time for a look."""
        since = self._clock() - self._last_s
        return self._share > 0 and since * self._share >= self._took_s

    @contextmanager
    def look(self) -> Iterator[None]:
        """Times a look."""
        start = self._clock()
        yield
        self._last_s = self._clock()
        self._took_s = self._last_s - start
