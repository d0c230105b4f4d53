"""What Prometheus is told: how requests went, and how the pool is doing."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from rayreward.keeper import Status

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_POOL = {
    "rows_scored": "Texts scored since the pool began.",
    "tokens_scored": "Tokens of those.",
    "rows_waiting": "Texts that wait to be handed to an actor.",
    "actors": "Actors that may work.",
    "version": "Number of the weights that it scores with.",
}


class Metrics:
    """An ASGI middleware that counts and times requests, and what Prometheus reads."""

    def __init__(self, paths: Collection[str]) -> None:
        """
        Args:
            paths: That are counted by their names; all others together.
        """
        self._paths = frozenset(paths)
        self._registry = CollectorRegistry()
        to = self._registry
        self._requests = Counter(
            "rayreward_requests", "Requests answered.", ["path", "status"], registry=to
        )
        self._seconds = Histogram(
            "rayreward_request_seconds",
            "From a request to its answer.",
            ["path"],
            buckets=_SECONDS,
            registry=to,
        )
        self._under_way = Gauge(
            "rayreward_requests_under_way", "Requests not answered yet.", registry=to
        )
        self._pool = {
            name: Gauge(f"rayreward_pool_{name}", text, registry=to) for name, text in _POOL.items()
        }

    def middleware(self, app: Any) -> Any:
        """Counts what goes through an ASGI app."""

        async def counted(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            path = scope["path"] if scope["path"] in self._paths else "other"
            status = "gone"  # the client went before there was an answer

            async def send_on(message: Any) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = str(message["status"])
                await send(message)

            start = time.perf_counter()
            with self._under_way.track_inprogress():
                try:
                    await app(scope, receive, send_on)
                finally:
                    self._requests.labels(path, status).inc()
                    self._seconds.labels(path).observe(time.perf_counter() - start)

        return counted

    def render(self, pool: Status) -> bytes:
        """In Prometheus' text format."""
        for name, gauge in self._pool.items():
            gauge.set(pool.version.number if name == "version" else getattr(pool, name))
        return generate_latest(self._registry)
