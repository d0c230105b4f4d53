"""recheck: looks at the weights take a bounded share of the time."""

from __future__ import annotations

import pytest

from rayreward.recheck import Recheck


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("share", [0.005, 0.1])
@pytest.mark.parametrize("look_s", [0.02, 3.0])
def test_looks_take_at_most_their_share(share: float, look_s: float) -> None:
    clock = Clock()
    recheck = Recheck(share, clock)
    looks, start = 0, clock.now
    while clock.now - start < 100 * look_s / share:
        clock.now += look_s * 2  # a shard
        if recheck.due:
            with recheck.look():
                clock.now += look_s
            looks += 1
    spent = (looks - 1) * look_s / (clock.now - start)  # the first is due at once
    assert 0.8 * share < spent <= share


def test_share_of_nothing_is_never_due() -> None:
    clock = Clock()
    recheck = Recheck(0, clock)
    clock.now += 10**9
    assert not recheck.due
