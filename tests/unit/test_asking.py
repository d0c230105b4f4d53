"""What a caller does about a keeper's failures."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import TaskCancelledError

from rayreward.asking import Asker
from rayreward.types import Text


def test_request_whose_call_ray_cancels_is_taken_back() -> None:
    """Ray cancels what a task has called with the task itself, in any order."""
    canceled: list[str] = []

    async def ask(*_: Any) -> None:
        raise TaskCancelledError

    keeper = SimpleNamespace(
        ask=SimpleNamespace(remote=ask), cancel=SimpleNamespace(remote=canceled.append)
    )
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(Asker("rm", keeper).score([[Text("", "a")]], None, patient=True))
    assert len(canceled) == 1
