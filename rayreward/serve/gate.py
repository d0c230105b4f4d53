"""Lets requests in until the server ends, and waits until those inside have been answered."""

from __future__ import annotations

import asyncio
from typing import Any

from rayreward.serve.replies import problem

_RETRY_S = "5"
"""When a client may try again, there or at another server."""


class Gate:
    """An ASGI middleware that can be closed."""

    def __init__(self) -> None:
        self._inside = 0
        self._closed = False
        self._empty = asyncio.Event()
        self._empty.set()

    async def close(self, timeout_s: float) -> None:
        """Lets nobody in any more, and waits until all are out.

        Args:
            timeout_s: How long to wait for them.

        Raises:
            TimeoutError: Some are not.
        """
        self._closed = True
        async with asyncio.timeout(timeout_s):
            await self._empty.wait()

    def middleware(self, app: Any) -> Any:
        """Lets requests in to an ASGI app, or tells them that it is too late."""

        async def let_in(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            if self._closed:
                message = "This server is ending: ask another, or again when it is back."
                await problem(503, message, {"Retry-After": _RETRY_S})(scope, receive, send)
                return
            self._inside += 1
            self._empty.clear()
            try:
                await app(scope, receive, send)
            finally:
                self._inside -= 1
                if not self._inside:
                    self._empty.set()

        return let_in
