"""Clients that may not ask, or ask a server that ends or has no pool: what they are told."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.testclient import TestClient

from rayreward import PoolTimeoutError
from rayreward.integrations.pools import PoolClient
from rayreward.serve.app import Settings, make_app
from rayreward.serve.gate import Gate
from rayreward.serve.guard import digest


class Pool:
    """Says of itself what a test wants."""

    actors = 1

    async def status_async(self, timeout_s: float) -> Any:
        if self.actors < 0:
            raise PoolTimeoutError(f"not within {timeout_s} s")
        return SimpleNamespace(
            actors=self.actors,
            version=SimpleNamespace(number=3),
            rows_scored=0,
            tokens_scored=0,
            rows_waiting=0,
        )


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    made = Pool()
    monkeypatch.setattr(PoolClient, "pool", made)
    return made


@pytest.fixture
def client(pool: Pool, gate: Gate) -> Iterator[TestClient]:
    settings = Settings(pool="p", token=None, max_bytes=1_000, timeout_s=1.0)
    with TestClient(make_app(settings, gate)) as opened:
        yield opened


def test_health_is_what_the_pool_says(client: TestClient, pool: Pool) -> None:
    assert client.get("/health").json() == {"status": "ok", "actors": 1, "version": 3}
    pool.actors = 0
    answer = client.get("/health")
    assert answer.status_code == 503
    assert "no actor" in answer.json()["error"]["message"]
    pool.actors = -1
    for path in ("/health", "/metrics"):
        assert client.get(path).status_code == 504


def test_server_that_ends_tells_clients_to_ask_another(client: TestClient, gate: Gate) -> None:
    asyncio.run(gate.close(1.0))
    for answer in (client.get("/health"), client.post("/reward", json={"items": ["a"]})):
        assert answer.status_code == 503
        assert answer.headers["Retry-After"] == "5"
        assert "This server is ending" in answer.json()["error"]["message"]


def test_token_comes_in_a_header_or_in_the_url(pool: Pool, gate: Gate) -> None:
    settings = Settings(pool="p", token=digest("secret"), max_bytes=1_000, timeout_s=1.0)
    with TestClient(make_app(settings, gate)) as client:

        def ask(**headers: str) -> int:
            code: int = client.get("/metrics", headers=headers).status_code
            return code

        assert ask(authorization="Bearer secret") == 200
        assert client.get("http://rm:secret@testserver/metrics").status_code == 200
        for wrong in (
            "secret",
            "Bearer",
            "Bearer secrets",
            "Basic secret",
            "Basic cm06c2VjcmV0cw==",
        ):
            assert ask(authorization=wrong) == 401
        assert ask() == 401


def test_gate_closes_behind_the_last_request() -> None:
    async def check() -> None:
        gate, answered = Gate(), asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await answered.wait()

        request = asyncio.create_task(gate.middleware(app)({"type": "http"}, None, None))
        await asyncio.sleep(0)
        with pytest.raises(TimeoutError):
            await gate.close(0.01)
        closing = asyncio.create_task(gate.close(10))
        await asyncio.sleep(0)
        assert not closing.done()
        answered.set()
        await closing
        assert request.done()

    asyncio.run(check())
