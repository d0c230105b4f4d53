"""signals: a signal waits for `check`, a second one does not, and handlers are given back."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator

import pytest

from rayreward import signals
from rayreward.errors import Interrupted

BOTH = pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    """Signals that nobody watches do nothing here, and none is left over for other tests."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    yield
    with signals.watched():
        pass
    for number, handler in before.items():
        signal.signal(number, handler)


def _interrupted(by: Callable[[], None]) -> int | None:
    """The signal that a call raises `Interrupted` for. Uncaught, it would end the whole run."""
    try:
        by()
    except Interrupted as error:
        return error.signum
    return None


@BOTH
def test_signals_wait_for_check(signum: int) -> None:
    with signals.watched():
        assert _interrupted(signals.check) is None
        assert _interrupted(lambda: signal.raise_signal(signum)) is None
        assert _interrupted(signals.check) == signum


def test_signals_stay_noticed() -> None:
    with signals.watched():
        signal.raise_signal(signal.SIGINT)
        assert _interrupted(signals.check) == signal.SIGINT
        assert _interrupted(signals.check) == signal.SIGINT


@BOTH
def test_signals_second_one_does_not_wait(signum: int) -> None:
    with signals.watched():
        signal.raise_signal(signal.SIGINT)
        assert _interrupted(lambda: signal.raise_signal(signum)) == signum


@BOTH
def test_signals_handlers_are_restored(signum: int) -> None:
    seen: list[int] = []
    signal.signal(signum, lambda number, _: seen.append(number))
    mine = signal.getsignal(signum)
    with signals.watched():
        assert signal.getsignal(signum) is not mine
    assert signal.getsignal(signum) is mine
    signal.raise_signal(signum)
    assert seen == [signum]


@BOTH
def test_signals_handlers_are_restored_after_an_interrupt(signum: int) -> None:
    def interrupted() -> None:
        with signals.watched():
            signal.raise_signal(signum)
            signals.check()

    before = signal.getsignal(signum)
    assert _interrupted(interrupted) == signum
    assert signal.getsignal(signum) is before


@BOTH
def test_signals_rearm_takes_the_handlers_back(signum: int) -> None:
    with signals.watched():
        signal.signal(signum, signal.SIG_IGN)
        signals.rearm()
        signal.raise_signal(signum)
        assert _interrupted(signals.check) == signum


@BOTH
def test_signals_rearm_does_nothing_outside_a_watch(signum: int) -> None:
    before = signal.getsignal(signum)
    signals.rearm()
    assert signal.getsignal(signum) is before
    with signals.watched():
        pass
    signals.rearm()
    assert signal.getsignal(signum) is before


def test_signals_do_not_reach_into_the_next_watch() -> None:
    with signals.watched():
        signal.raise_signal(signal.SIGTERM)
    with signals.watched():
        assert _interrupted(signals.check) is None


def test_signals_are_forgotten_after_the_watch() -> None:
    with signals.watched():
        signal.raise_signal(signal.SIGTERM)
    assert _interrupted(signals.check) is None
