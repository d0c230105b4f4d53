"""A peer in a process of its own, as the driver sees it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, Self

from environments import BUILD, Unavailable, python_of

HERE = Path(__file__).parent
THREADS = 2
SETTINGS = {
    "OMP_NUM_THREADS": str(THREADS),
    "MKL_NUM_THREADS": str(THREADS),
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Of the environment of all peers, which they and the Ray cluster have from who starts them."""
ON_RAY = ("ours", "ray_data")
"""Never stopped between requests: Ray's processes watch one another, and idle when not asked."""

STARTS_ANEW = ("ray_data",)
"""Keep nothing from one request to the next, so that there is nothing to warm up."""

PATIENCE_S = 600.0
"""A peer that takes longer, to start or for a request, has failed."""


class PeerFailed(Exception):
    """A peer can't be started, or can't score; says why."""


class Worker:
    """Speaks `workers/_protocol.py`. Use it as a context manager: leaving ends the process.

    Attributes:
        peer: Its name.
        load_s: Seconds that it took to load.
        versions: Of the packages that matter to it.
        batch_sizes: What its user would try; [None] where it makes batches itself.
    """

    load_s: float
    versions: dict[str, str]
    batch_sizes: list[int | None]

    def __init__(self, peer: str, checkpoint: str) -> None:
        """Starts the process, and does not wait for it.

        Raises:
            PeerFailed: It can't be installed.
        """
        self.peer = peer
        BUILD.mkdir(parents=True, exist_ok=True)
        self.log = BUILD / f"{peer}.log"
        try:
            python = python_of(peer)
        except Unavailable as error:
            raise PeerFailed(str(error)) from error
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                (python, HERE / "workers" / "_protocol.py", peer, checkpoint),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C is for the driver, which then ends its workers
            )

    def wait_until_ready(self) -> None:
        """Waits until the peer is loaded, then stops it until it is asked.

        Raises:
            PeerFailed: It can't be loaded.
        """
        try:
            ready = self._receive()
        except BaseException:
            self.end(patience_s=0)
            raise
        self.load_s = round(ready["own_s"], 1)
        self.versions, self.batch_sizes = ready["versions"], ready["batch_sizes"]
        self._signal(signal.SIGSTOP)

    def describe(self) -> dict[str, Any]:
        return {"load_s": self.load_s, "versions": self.versions}

    def score(self, groups: list[list[str]], batch_size: int | None) -> dict[str, Any]:
        """Its reply: `rewards`, what it says it took in `own_s`, what was waited in `asked_s`.

        Raises:
            PeerFailed: It can't, it has died, or its rewards are not a number for each text.
        """
        self._signal(signal.SIGCONT)
        started = time.perf_counter()
        with contextlib.suppress(OSError):  # it has died, and _receive says so
            print(
                json.dumps({"groups": groups, "batch_size": batch_size}),
                file=self.process.stdin,
                flush=True,
            )
        reply = self._receive()
        reply["asked_s"] = time.perf_counter() - started
        self._signal(signal.SIGSTOP)
        finite = [reward for reward in reply["rewards"] if math.isfinite(reward)]
        if len(finite) != sum(map(len, groups)):
            raise PeerFailed("not every text has a finite reward")
        return reply

    def _receive(self) -> dict[str, Any]:
        watchdog = threading.Timer(PATIENCE_S, self._kill)
        watchdog.start()
        try:
            line = self.process.stdout.readline()
        finally:
            watchdog.cancel()
        if not line.endswith("\n"):
            said = self.log.read_text(errors="replace").strip().splitlines() or ["nothing"]
            raise PeerFailed(
                f"died, or took longer than {PATIENCE_S:.0f} s; last words: {said[-1]}"
            )
        reply = json.loads(line)
        if "error" in reply:
            raise PeerFailed(reply["error"])
        return reply

    def end(self, patience_s: float) -> None:
        """Closes its stdin, at which it ends; what is left after a while is killed.

        Once it has ended, does nothing.
        """
        if self.process.returncode is not None:
            return
        self._signal(signal.SIGCONT)
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience_s)
        self._kill()
        self.process.wait()
        self.process.stdout.close()

    def _signal(self, what: signal.Signals) -> None:
        """Stops a peer while others have their turn, or lets it go on.

        Some poll while they wait, such as vLLM's workers, and take the cores from the others.
        """
        if self.peer not in ON_RAY:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, what)

    def _kill(self) -> None:
        """Kills the process and all that it started: they are a process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.end(patience_s=60 if error is None else 5)
