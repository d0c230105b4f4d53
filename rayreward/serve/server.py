"""The service on Ray Serve: started, and ended when it has answered what it was asked."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.schema import LoggingConfig

from rayreward.config import ServeConfig
from rayreward.errors import ConfigError, PoolError
from rayreward.serve.app import Settings, make_app
from rayreward.serve.gate import Gate
from rayreward.serve.guard import digest

TOKEN = "RAYREWARD_TOKEN"
"""Environment variable with the token, where no file has it."""

_APP = "rayreward"

_AT_ONCE = 4_096
"""Requests that may be under way; the pool's queue is bounded by texts."""


def application(pool: str, config: ServeConfig | None = None) -> serve.Application:
    """The service for one pool, to be run beside others: `serve.run(application("rm"))`.

    Args:
        pool: Name of the pool.
        config: `host`, `port` and `drain_s` are for Ray Serve to decide there.

    Raises:
        ConfigError: The token can't be read.
    """
    config = config or ServeConfig()
    token = read_token(config)
    settings = Settings(
        pool=pool,
        token=None if token is None else digest(token),
        max_bytes=int(config.max_body_mb * 2**20),
        timeout_s=config.timeout_s,
    )
    deployment: Any = serve.deployment(
        name=_APP,
        max_ongoing_requests=_AT_ONCE,
        graceful_shutdown_timeout_s=config.drain_s,
        graceful_shutdown_wait_loop_s=0.1,
        logging_config=LoggingConfig(enable_access_log=False),  # /metrics counts
        ray_actor_options={"num_cpus": 0},
    )

    bound: serve.Application = deployment(serve.ingress()(_Replica)).bind(settings)
    return bound


class _Replica:
    """What runs in Ray Serve's replica: the service, which can be told to answer no more."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def __serve_build_asgi_app__(self) -> Any:
        """Called by Ray Serve."""
        self._gate = Gate()
        return make_app(self._settings, self._gate)

    async def drain(self, timeout_s: float) -> None:
        """Refuses new requests, and waits until the others are answered."""
        await self._gate.close(timeout_s)


@contextlib.contextmanager
def serving(pool: str, config: ServeConfig) -> Iterator[str]:
    """Serves a pool over HTTP; yields the URL. In the end what was asked is still answered.

    Args:
        pool: Name of the pool. Ray runs already.
        config: Where, and for whom.

    Raises:
        ConfigError: Others could reach it, and there is no token; the token can't be read; or
            somebody listens on the port already.
        PoolError: Ray Serve runs in this cluster already.
    """
    check_reach(config)
    check_free(config)
    app = application(pool, config)
    if serve.status().proxies:
        raise PoolError(
            "Ray Serve runs in this cluster already, at an address of its own. Run this beside "
            "the others: serve.run(rayreward.serve.application(NAME), name=…, route_prefix=…)."
        )
    serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        http_options=HTTPOptions(host=config.host, port=config.port, keep_alive_timeout_s=65),
    )
    try:
        handle = serve.run(app, name=_APP)
        try:
            yield f"http://{config.host}:{config.port}"
        finally:
            _drain(handle, config.drain_s)
    finally:
        serve.shutdown()


def _drain(handle: Any, drain_s: float) -> None:
    """Ends the replica once it has answered, while the proxy can still pass its answers on."""
    with contextlib.suppress(TimeoutError):  # some take too long: they get no answer
        handle.drain.remote(drain_s).result(timeout_s=drain_s + 5)
    serve.delete(_APP)  # waits until answers are on their way, which shutdown does not


def check_reach(config: ServeConfig) -> None:
    """Refuses to serve to others without a token.

    Raises:
        ConfigError: Others could reach the server, and there is no token; or it can't be read.
    """
    if read_token(config) is None and not _is_loopback(config.host):
        raise ConfigError(
            f"Others can reach host={config.host!r}, and there is no token that they would have to "
            f"know. Write one to a file for --token-file, set {TOKEN}, or serve on 127.0.0.1."
        )


def check_free(config: ServeConfig) -> None:
    """Refuses a port that somebody listens on: Ray Serve would share it, each with some requests.

    Raises:
        ConfigError: It is taken.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise ConfigError(
                f"Can't listen on {config.host}:{config.port} ({error}). End what does, or "
                "pass another --port."
            ) from error


def read_token(config: ServeConfig) -> str | None:
    """The token that requests must carry, if there is one.

    Raises:
        ConfigError: It can't be read.
    """
    if config.token_file is None:
        return os.environ.get(TOKEN) or None
    try:
        token = Path(config.token_file).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"token_file={config.token_file!r} can't be read: {error}.") from error
    if not token:
        raise ConfigError(f"token_file={config.token_file!r} is empty: write a token into it.")
    return token


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
