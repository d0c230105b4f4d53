"""Replies as JSON: what cannot be written as UTF-8 is escaped, and an error says why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response


class AsciiJSON(Response):
    """JSON of ASCII alone: half of a surrogate pair, which a client may send, can be sent back."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The bytes of a reply."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def problem(
    code: int, message: str, headers: Mapping[str, str] | None = None, **more: Any
) -> AsciiJSON:
    """A reply that says what happened and what to do next.

    Args:
        code: HTTP's status.
        message: For people.
        headers: To send with it.
        **more: For programs.
    """
    error = {"code": code, "message": message, **more}
    return AsciiJSON({"error": error}, code, dict(headers or {}))
