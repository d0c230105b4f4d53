"""Imports that garbage collections leave alone."""

from __future__ import annotations

import gc

from rayreward.collector import importing


def test_nothing_is_collected_meanwhile_and_nothing_of_it_later() -> None:
    try:
        with importing():
            assert not gc.isenabled()
            kept = [[] for _ in range(1_000)]
        assert gc.isenabled()
        assert gc.get_freeze_count() > len(kept)
        gc.disable()
        with importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()
