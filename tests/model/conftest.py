"""Fixtures for tests that run models in their own process."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def nothing_compiled() -> None:
    """The compiler as in a new process: other tests may have given it as many kinds as it takes."""
    torch._dynamo.reset()
