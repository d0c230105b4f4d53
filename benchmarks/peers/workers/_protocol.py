"""What every worker does around its peer: loads it, then answers requests until stdin closes.

    python benchmarks/peers/workers/_protocol.py PEER CHECKPOINT

Messages are JSON, one a line. The worker speaks first, once its peer is loaded:
{"versions": {…}, "batch_sizes": […]}. Then it answers {"groups": [[text, …], …], "batch_size": 8}
with {"rewards": [1.5, …]}, in the texts' order. Where a peer fails, {"error": "…"} comes instead.
Every reply says in "own_s" how many seconds it took.

A peer is a module beside this one. Its `load(checkpoint)` returns a function from groups and a
batch size to rewards, or to a whole reply; PACKAGES are those whose versions matter, and
BATCH_SIZES, where it has them, those that its user would try.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, TextIO


def main() -> None:
    name, checkpoint = sys.argv[1:]
    requests, replies = claim_stdio()
    scores: list[Callable[[list[list[str]], int | None], Any]] = []

    def load() -> dict[str, Any]:
        peer = importlib.import_module(name)
        scores.append(peer.load(checkpoint))
        versions = {package: importlib.metadata.version(package) for package in peer.PACKAGES}
        return {"versions": versions, "batch_sizes": getattr(peer, "BATCH_SIZES", [None])}

    def score(request: dict[str, Any]) -> dict[str, Any]:
        found = scores[0](request["groups"], request["batch_size"])
        return found if isinstance(found, dict) else {"rewards": found}

    answer(replies, load)
    for line in requests if scores else ():
        answer(replies, score, json.loads(line))


def claim_stdio() -> tuple[TextIO, TextIO]:
    """Keeps stdin and stdout for messages; what libraries print goes to stderr."""
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    return requests, replies


def answer(replies: TextIO, work: Callable[..., dict[str, Any]], *arguments: Any) -> None:
    start = time.perf_counter()
    try:
        reply = work(*arguments)
    except Exception as error:
        traceback.print_exc()
        reply = {"error": f"{type(error).__name__}: {error}"}
    reply["own_s"] = time.perf_counter() - start
    print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
