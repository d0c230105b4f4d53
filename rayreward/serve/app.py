"""The routes: bodies in, replies out, and a status for everything that goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from rayreward._version import __version__
from rayreward.errors import (
    DataError,
    ModelError,
    PoolBusyError,
    PoolError,
    PoolTimeoutError,
    RayRewardError,
)
from rayreward.integrations.pools import PoolClient
from rayreward.pool import RewardPool
from rayreward.serve.dialects.base import Body, NoReward
from rayreward.serve.dialects.inference import AnyClassifyBody, EmbeddingsBody
from rayreward.serve.dialects.ours import RewardBody, RewardReply
from rayreward.serve.dialects.trainers import OpenRLHFBody, SlimeBody
from rayreward.serve.gate import Gate
from rayreward.serve.guard import Guard
from rayreward.serve.metrics import Metrics
from rayreward.serve.replies import AsciiJSON, problem

_RETRY_S = "1"
"""When a client may try again that found the queue full."""

_STATUS_S = 5.0
"""How long the pool may take to say how it is doing."""

_PATHS = ("/reward", "/classify", "/v1/embeddings", "/get_reward", "/slime", "/health", "/metrics")


@dataclass(frozen=True, slots=True)
class Settings:
    """Of one server.

    Attributes:
        pool: Its name.
        token: Digest of the token that requests carry, or null.
        max_bytes: The largest body.
        timeout_s: How long a request may take.
    """

    pool: str
    token: bytes | None
    max_bytes: int
    timeout_s: float


def make_app(settings: Settings, gate: Gate) -> FastAPI:
    """The service, for the process that it runs in.

    Args:
        settings: Of the server.
        gate: That requests go through, and that is closed when the server ends.
    """
    found = PoolClient(settings.pool)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(lambda: found.pool)
        yield

    app = FastAPI(
        title="RayReward",
        version=__version__,
        lifespan=lifespan,
        default_response_class=AsciiJSON,
        responses={422: {"description": "The body is wrong, or a text has no reward."}},
    )
    metrics = Metrics(_PATHS)
    app.add_middleware(Guard, token=settings.token, max_bytes=settings.max_bytes)
    app.add_middleware(gate.middleware)
    app.add_middleware(metrics.middleware)
    _answer_errors(app)

    async def answer(body: Body) -> Any:
        return await _answer(found.pool, body, settings.timeout_s)

    @app.post("/reward", response_model=None, responses={200: {"model": RewardReply}})
    async def reward(body: RewardBody) -> AsciiJSON:
        """Rewards texts, conversations and groups of completions; says why one has none."""
        reply: RewardReply = await answer(body)
        return AsciiJSON(reply.model_dump())

    @app.post("/classify")
    async def classify(body: AnyClassifyBody) -> Any:
        """Rewards as vLLM (`input`, `messages`) and SGLang (`text`) give them."""
        return AsciiJSON(await answer(body))

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingsBody) -> Any:
        """Rewards as SGLang's OpenAI-like server gives them: each is an embedding."""
        return AsciiJSON(await answer(body))

    @app.post("/get_reward")
    async def get_reward(body: OpenRLHFBody) -> Any:
        """Rewards as OpenRLHF asks for them."""
        return AsciiJSON(await answer(body))

    @app.post("/slime")
    async def slime(body: SlimeBody) -> Any:
        """One reward as slime asks for it."""
        return AsciiJSON(await answer(body))

    @app.get("/health")
    async def health() -> Any:
        """Whether the pool answers, and which weights it has."""
        status = await found.pool.status_async(timeout_s=_STATUS_S)
        if not status.actors:
            raise PoolError("The pool has no actor that may work; it tries to bring one up.")
        return AsciiJSON(
            {"status": "ok", "actors": status.actors, "version": status.version.number}
        )

    @app.get("/metrics")
    async def show_metrics() -> Response:
        """For Prometheus."""
        status = await found.pool.status_async(timeout_s=_STATUS_S)
        return Response(metrics.render(status), media_type="text/plain; version=0.0.4")

    return app


async def _answer(pool: RewardPool, body: Body, timeout_s: float) -> Any:
    groups = body.samples()
    flat = [sample for group in groups for sample in group]
    audited = await pool.score_audited_async(flat, timeout_s=timeout_s, patient=False)
    outcomes = iter(audited.outcomes)
    return body.reply([list(islice(outcomes, len(group))) for group in groups], audited.version)


def _answer_errors(app: FastAPI) -> None:
    """Everything that can go wrong, as JSON with a reason."""

    def on(kind: type[Exception], reply: Callable[[Any], Response]) -> None:
        async def handle(_: Request, error: Exception) -> Response:
            return reply(error)

        app.add_exception_handler(kind, handle)

    on(RequestValidationError, lambda e: problem(422, _why(e), errors=len(e.errors())))
    on(HTTPException, lambda e: problem(e.status_code, str(e.detail), e.headers))
    on(
        NoReward,
        lambda e: problem(
            422,
            f"Text {e.row} has no reward: {e.failure.detail}. /reward answers for the others.",
            row=e.row,
            status=str(e.failure.status),
        ),
    )
    on(DataError, lambda e: problem(422, str(e)))
    on(ModelError, lambda e: problem(422, str(e)))
    on(PoolBusyError, lambda e: problem(429, str(e), {"Retry-After": _RETRY_S}))
    on(PoolTimeoutError, lambda e: problem(504, str(e)))
    on(PoolError, lambda e: problem(503, str(e), {"Retry-After": _RETRY_S}))
    on(RayRewardError, lambda e: problem(500, str(e)))


def _why(error: RequestValidationError) -> str:
    """What is wrong with a body, and where. Of what may be one of several, there is an error for
    each; the one furthest in is of the one that it is most like.
    """
    furthest = max(error.errors(), key=lambda each: len(each["loc"]))
    where = ".".join(map(str, furthest["loc"]))
    return f"{where}: {furthest['msg']}. /docs shows what a body looks like."
