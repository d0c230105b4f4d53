"""Tells the C library's allocator what to do with freed memory. Process-wide.

Activations of a batch on a CPU are tens of megabytes each. By default glibc hands such blocks back
to the system when they are freed, and every new one comes page by page, zeroed: a tenth of the time
of a 135M model's batches. Kept for the next batch they fall into pieces, since batches differ in
size, and a process grows by a gigabyte in minutes, so every now and then all of them go back.

That is so in the arena of a process's first thread. Other threads have arenas of their own, made of
heaps of 64 MB that go back as soon as they are empty, and what is larger comes page by page again.
So a process whose model runs on another thread has to be started with one arena for all of them.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Source: mallopt(3) and glibc's malloc.h."""

_KEEP_BYTES = 1 << 30

ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}
"""The environment to start such a process with. glibc reads it once, so it can't be set later.
Source: mallopt(3); HEAP_MAX_SIZE in glibc's arena.c."""

_HAND_BACK_EVERY_S = 120.0
"""It takes a tenth of a second for a gigabyte, and the next batch as long as it would without all
this."""


class FreedMemory:
    """Memory that this process has freed. Does nothing without glibc."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            clock: Seconds that only grow.
        """
        self._libc = _find_glibc()
        self._clock = clock
        self._turn = threading.Lock()
        self._handed_back_s = clock()

    def keep(self) -> None:
        """Keeps up to a gigabyte of it in one piece from now on."""
        if self._libc is not None:
            for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
                self._libc.mallopt(option, _KEEP_BYTES)

    def hand_back(self) -> None:
        """Hands all of it back to the system, where that was not done within two minutes."""
        with self._turn:
            due = self._clock() >= self._handed_back_s + _HAND_BACK_EVERY_S
            if due and self._libc is not None:
                self._libc.malloc_trim(0)
                self._handed_back_s = self._clock()


def _find_glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
