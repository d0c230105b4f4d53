"""meter: how much of the time between its first and its last batch a model worked."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from rayreward.meter import ModelTime


def clock(times: Iterable[float]) -> Callable[[], float]:
    return iter(times).__next__


def test_model_time_counts_work_and_leaves_out_waiting() -> None:
    spent = ModelTime()
    for start, end in ((10, 14), (15, 20)):
        with spent.running(clock([start, end])):
            pass
    assert spent == ModelTime(10, 20, 9)
    assert spent.busy_share(models=1) == 0.9


def test_times_of_several_models_add_up() -> None:
    total = ModelTime() + ModelTime(10, 20, 9) + ModelTime(12, 30, 15) + ModelTime()
    assert total == ModelTime(10, 30, 24)
    assert total.busy_share(models=2) == pytest.approx(0.6)


def test_model_that_never_worked_has_no_share() -> None:
    assert ModelTime().busy_share(models=1) is None
