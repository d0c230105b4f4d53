"""Ctrl-C and SIGTERM, noticed at a moment of our choosing.

A handler only sets a flag; loops that wait call `check`. So a signal never lands in the middle of
committing a part. A second signal does not wait for that.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from rayreward.errors import Interrupted

_WATCHED = (signal.SIGINT, signal.SIGTERM)


class _State:
    armed = False
    received: int | None = None


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Inside, signals are kept for `check`. For the main thread of a command-line program."""
    before = {number: signal.getsignal(number) for number in _WATCHED}
    try:
        _State.armed, _State.received = True, None
        rearm()
        yield
    finally:
        _State.armed, _State.received = False, None
        for number, handler in before.items():
            signal.signal(number, handler)


def rearm() -> None:
    """Installs the handlers again: `ray.init` puts its own in their place."""
    if _State.armed:
        for number in _WATCHED:
            signal.signal(number, _note)


def check() -> None:
    """Raises Interrupted if a signal has come."""
    if _State.received is not None:
        raise Interrupted(_State.received)


def _note(signum: int, _frame: FrameType | None) -> None:
    if _State.received is not None:
        raise Interrupted(signum)
    _State.received = signum
