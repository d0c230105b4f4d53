"""Whose turn it is to use the model, where several threads want to.

Knows threads; does not know what is done with a turn.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")


class Turns:
    """Calls functions one after the other, each on the thread that asks for it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def take(self, function: Callable[[], _T]) -> _T:
        """Calls a function when no other is under way, save one that asks for this one."""
        with self._lock:
            return function()


class OneThread(Turns):
    """Calls them all on one thread of its own, which ends when nobody holds this object any more.

    OpenMP keeps a team of threads for each thread that computes. Where there are more of them than
    cores, idle ones included, they no longer spin while they wait for one another
    (`rayreward.threads`), and each team leaves its own pieces of memory behind.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "model")
        self._ident = self._thread.submit(threading.get_ident).result()

    def take(self, function: Callable[[], _T]) -> _T:
        """As in `Turns`; whoever asks waits."""
        if threading.get_ident() == self._ident:
            return function()
        return self._thread.submit(function).result()
