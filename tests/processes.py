"""Other processes: waiting for what they do, and the cluster that they are to use."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from typing import Any


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 120) -> None:
    """Waits for something that another process does."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.02)


def environment_in(ray_cluster: Any) -> dict[str, str]:
    """The environment of a process that works in a cluster that is up."""
    address: str = ray_cluster.get_runtime_context().gcs_address
    return {**os.environ, "RAY_ADDRESS": address}


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port
