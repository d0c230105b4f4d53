"""Who may ask, how much at once, and how slowly: an ASGI middleware."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import time
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

from rayreward.serve.replies import problem

_OPEN = ("/health",)
"""Paths that tell nothing, and that load balancers ask without a token."""

_BODY_S = 30.0
"""How long a body may take to arrive."""


def digest(token: str) -> bytes:
    """What is kept of a token."""
    return hashlib.sha256(token.encode()).digest()


class Guard:
    """Lets requests pass that carry the token and are not too large."""

    def __init__(self, app: Any, *, token: bytes | None, max_bytes: int) -> None:
        """
        Args:
            app: What is guarded.
            token: Digest of the token that requests carry. Null: anybody may ask.
            max_bytes: The largest body.
        """
        self._app = app
        self._token = token
        self._max_bytes = max_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Lets one request pass, or answers it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refused = self._refuse(scope)
        if refused is not None:
            await refused(scope, receive, send)
        else:
            await self._app(scope, _Bounded(receive, self._max_bytes), send)

    def _refuse(self, scope: Any) -> Response | None:
        headers = dict(scope["headers"])
        if self._token is not None and scope["path"] not in _OPEN:
            given = _token_of(headers.get(b"authorization", b""))
            if not hmac.compare_digest(hashlib.sha256(given).digest(), self._token):
                return problem(
                    401,
                    "The token is missing or wrong: send 'Authorization: Bearer TOKEN' with the "
                    "one that the server was started with, or ask http://rm:TOKEN@host:port/….",
                    {"WWW-Authenticate": "Bearer"},
                )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_bytes:
            return problem(413, _too_large(self._max_bytes))
        return None


def _token_of(authorization: bytes) -> bytes:
    """The token that a request carries; as a password, it comes from a client's URL."""
    scheme, _, given = authorization.partition(b" ")
    match scheme.lower():
        case b"bearer":
            return given.strip()
        case b"basic":
            with contextlib.suppress(ValueError):
                return base64.b64decode(given).partition(b":")[2]
    return b""


def _too_large(max_bytes: int) -> str:
    return (
        f"The body has more than {max_bytes} bytes: ask in smaller requests, or start the server "
        "with a larger --max-body-mb."
    )


class _Bounded:
    """Receives a body, as long as it is not too large and does not take too long."""

    def __init__(self, receive: Any, max_bytes: int) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._left = max_bytes
        self._deadline = time.monotonic() + _BODY_S
        self._complete = False

    async def __call__(self) -> Any:
        if self._complete:
            return await self._receive()
        try:
            async with asyncio.timeout(max(self._deadline - time.monotonic(), 0)):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(
                408, f"The body did not arrive within {_BODY_S:g} s: send it faster."
            ) from None
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise HTTPException(413, _too_large(self._max_bytes))
        self._complete = not message.get("more_body", False)
        return message
