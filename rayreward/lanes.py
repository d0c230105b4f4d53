"""Batches side by side on a CPU: two at a time, each on half of the threads.

A product's threads wait for the slowest of them, and few of them multiply while others do what is
elementwise. Another batch, which is somewhere else in the model, uses what they leave. A batch that
is alone has all threads, from its next layer on.

For that, rewards must not depend on the number of threads: it is tried when a model is loaded
(`rayreward.invariance`).

Knows torch's threads; does not know what a batch is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

SIDE_BY_SIDE = 2
"""Python runs one thread at a time between products: many would wait for it."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Lanes:
    """Threads that call torch, and share out the threads that torch computes with."""

    def __init__(self, count: int, threads: int) -> None:
        """
        Args:
            count: How many calls may run at the same time.
            threads: How many torch computes with, in all calls together; no fewer than `count`.
        """
        self._threads = threads
        self._running = 0
        self._turn = threading.Lock()
        self._executor = ThreadPoolExecutor(count, "lane")

    def map(self, function: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
        """Calls a function for each item, begun in their order; returns the results in it.

        Where a call raises, those that have not begun are left out, and none is running any more
        when the error is raised here.
        """
        calls = [self._executor.submit(self._call, function, item) for item in items]
        try:
            return [call.result() for call in calls]
        finally:
            for call in calls:
                call.cancel()
            wait(calls)

    def _call(self, function: Callable[[_Item], _Result], item: _Item) -> _Result:
        _here.lanes = self
        self._count(+1)
        try:
            self.share_threads()
            return function(item)
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        with self._turn:
            self._running += change

    def share_threads(self) -> None:
        """Gives the thread that calls its share of torch's threads."""
        share = self._threads // self._running
        if share != torch.get_num_threads():
            torch.set_num_threads(share)


_here = threading.local()


def share_threads() -> None:
    """To be called between layers: a batch may have come, or be alone by now."""
    lanes: Lanes | None = getattr(_here, "lanes", None)
    if lanes is not None:
        lanes.share_threads()
