"""Many clients with one text a request, over HTTP, against the same pool asked for all at once.

    python benchmarks/load.py [--clients 64] [--minutes 10]

On a local Ray, loopback only: a pool with one actor on two CPUs, served by Ray Serve. The model is
SmolLM2-135M-Instruct with a head drawn from seed 42; the texts are both sides of the pairs of
hh-harmless-test where they lie beside the checkout, else of the example pairs. Clients, server and
model share the machine.

- **offline**: `pool.score` on 256 texts at a time, before and after the load, in tokens a second;
- **load**: the clients ask `/reward`, each for its next text when it has the last one's reward;
  tokens a second, seconds from a request to its answer, and the memory of each process;
- **kill**: the actor is killed under the same load; every request has to be answered all the same.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import socket
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import ray
from common import RESULTS, hardware, pairs, smollm2, versions, write

from rayreward import RewardPool, ServeConfig
from rayreward.serve import serving

NAME = "load"
OFFLINE_TEXTS = 256
SAMPLE_S = 10.0
PROCESSES = ("RewardActor", "Keeper", "ServeReplica", "ProxyActor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--cpus", type=int, default=2, help="of the actor")
    parser.add_argument("--result", type=Path, default=RESULTS / "load.json")
    arguments = parser.parse_args()
    source, rows = pairs(2_000)
    texts = [
        {"prompt": row.get("prompt", ""), "completion": row[side]}
        for row in rows
        for side in ("chosen", "rejected")
    ]
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    ray.init(address="local", num_cpus=2, include_dashboard=False, configure_logging=False)
    settings: Any = {"num_actors": 1, "num_cpus_per_actor": arguments.cpus}
    with (
        RewardPool(smollm2(), seed=42, name=NAME, **settings) as pool,
        serving(NAME, ServeConfig(port=port)) as url,
    ):
        before = offline(pool, texts[:OFFLINE_TEXTS])
        load = asyncio.run(under_load(url, pool, texts, arguments))
        after = offline(pool, texts[OFFLINE_TEXTS : 2 * OFFLINE_TEXTS])
        killed = asyncio.run(under_load(url, pool, texts, arguments, kill=True))
    ray.shutdown()
    rate = statistics.mean((before, after))
    result = {
        "hardware": hardware(),
        "versions": versions("ray"),
        "workload": f"{arguments.clients} clients, one text of {source} a request",
        "offline_tokens_per_s": [round(before, 1), round(after, 1)],
        "load": load,
        "of_offline": round(load["tokens_per_s"] / rate, 3),
        "actor_killed": {name: killed[name] for name in ("requests", "errors", "longest_s")},
    }
    write(arguments.result, result)
    print(
        f"{load['tokens_per_s']} tokens/s by {arguments.clients} clients, "
        f"{result['of_offline']} of {rate:.1f} offline; "
        f"{load['requests']} requests, {load['errors']} errors; "
        f"p50 {load['p50_s']} s, p99 {load['p99_s']} s\n"
        f"memory in MB, minute by minute: {load['memory_mb']}\n"
        f"actor killed: {result['actor_killed']}"
    )


def offline(pool: RewardPool, texts: list[Any]) -> float:
    """Tokens a second of one call."""
    tokens, start = pool.status.tokens_scored, time.perf_counter()
    pool.score(texts)
    seconds = time.perf_counter() - start
    return (pool.status.tokens_scored - tokens) / seconds


async def under_load(
    url: str,
    pool: RewardPool,
    texts: list[Any],
    arguments: argparse.Namespace,
    *,
    kill: bool = False,
) -> dict[str, Any]:
    """What clients see for so many minutes, or, where the actor is killed, for one minute."""
    minutes = min(arguments.minutes, 1.0) if kill else arguments.minutes
    end = time.perf_counter() + 60 * minutes
    ask = itertools.cycle(texts)
    seconds: list[float] = []
    errors: list[str] = []
    memory: dict[str, list[float]] = defaultdict(list)
    tokens, start = pool.status.tokens_scored, time.perf_counter()

    async def client(session: aiohttp.ClientSession) -> None:
        while time.perf_counter() < end:
            asked = time.perf_counter()
            async with session.post(f"{url}/reward", json={"items": [next(ask)]}) as response:
                body = await response.json()
            if response.status != 200 or body["rewards"][0]["status"] != "ok":
                errors.append(str(body))
            seconds.append(time.perf_counter() - asked)

    async def watch() -> None:
        while True:
            for name, size in memory_mb():
                memory[name].append(size)
            await asyncio.sleep(SAMPLE_S)

    async def strike() -> None:
        await asyncio.sleep(10 * minutes)
        ray.kill(pool.actors[0])

    connector = aiohttp.TCPConnector(limit=arguments.clients)
    async with aiohttp.ClientSession(connector=connector) as session:
        aside = [asyncio.create_task(watch())]
        if kill:
            aside.append(asyncio.create_task(strike()))
        await asyncio.gather(*(client(session) for _ in range(arguments.clients)))
        for task in aside:
            task.cancel()
    took = time.perf_counter() - start
    scored = (await asyncio.to_thread(lambda: pool.status)).tokens_scored - tokens
    ordered = sorted(seconds)
    return {
        "minutes": minutes,
        "requests": len(seconds),
        "errors": len(errors),
        "first_error": errors[0] if errors else None,
        "tokens_per_s": round(scored / took, 1),
        "p50_s": round(ordered[len(ordered) // 2], 2),
        "p99_s": round(ordered[len(ordered) * 99 // 100], 2),
        "longest_s": round(ordered[-1], 2),
        "memory_mb": {name: by_minute(sizes) for name, sizes in memory.items()},
    }


def memory_mb() -> Iterator[tuple[str, float]]:
    """What each of the service's processes holds now, by what it is."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_text()
            pages = int((folder / "statm").read_text().split()[1])
        except (OSError, ValueError, IndexError):  # it has ended
            continue
        name = next((kind for kind in PROCESSES if title.startswith(f"ray::{kind}")), None)
        if name is not None:
            yield name, round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def by_minute(sizes: list[float]) -> list[float]:
    """The largest of each minute."""
    minute = int(60 / SAMPLE_S)
    return [max(sizes[at : at + minute]) for at in range(0, len(sizes), minute)]


if __name__ == "__main__":
    main()
