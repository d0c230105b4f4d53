"""The real dispatcher against simulated actors: up to 1,000 of them and 1,000,000 shards.

    python benchmarks/scale.py [--actors 1 10 100 1000] [--shards 10000 1000000]

Every number of actors gets the first number of shards, and the most actors get the others.
What is measured is the driver: its own time per shard and its memory. The actors live in a virtual
clock, where a shard takes 20 s give or take, one in a thousand takes twenty times as long, an actor
dies once in 5,000 shards and comes back a minute later, and proofs come every fifth shard. Checked
as well: each shard is proven exactly once.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import logging
import platform
import random
import resource
import sys
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

from rayreward.dispatch import Dispatcher
from rayreward.events import Born, Done, Event, Lost, Task

SHARD_S = 20.0
STRAGGLER = (0.001, 20.0)
DEATH = 1 / 5_000
BIRTH_S = 60.0
PROVE_EVERY = 5
AT_ONCE_S = 0.02
"""Events so close together reach the driver in one wait."""


class SimulatedFleet:
    """Actors in a virtual clock. Implements `rayreward.dispatch.Fleet`."""

    def __init__(self, seed: int) -> None:
        self.now_s = 0.0
        self.deaths = 0
        self._dice = random.Random(seed)
        self._queues: dict[int, deque[tuple[int, Task]]] = {}
        self._generation: Counter[int] = Counter()
        self._unproven: Counter[int] = Counter()
        self._heap: list[tuple[float, int, int, int, str]] = []
        self._order = itertools.count()

    def start(self, actor: int) -> None:
        self._generation[actor] += 1
        self._unproven[actor] = 0
        self._queues[actor] = deque()
        self._push(BIRTH_S, actor, "born")

    def submit(self, actor: int, task: Task) -> int:
        ticket = next(self._order)
        self._queues[actor].append((ticket, task))
        if len(self._queues[actor]) == 1:
            self._work(actor)
        return ticket

    def wait(self, timeout_s: float) -> list[Event]:
        events: list[Event] = []
        until = self._heap[0][0] + AT_ONCE_S if self._heap else 0.0
        while self._heap and self._heap[0][0] <= until:
            self.now_s, _, actor, generation, what = heapq.heappop(self._heap)
            if generation == self._generation[actor]:
                events.append(self._event(actor, what))
        return events

    def forget(self, ticket: Any) -> None:
        """Nothing is abandoned here."""

    def stop(self, actor: int) -> None:
        self._generation[actor] += 1

    def _push(self, after_s: float, actor: int, what: str) -> None:
        entry = (self.now_s + after_s, next(self._order), actor, self._generation[actor], what)
        heapq.heappush(self._heap, entry)

    def _work(self, actor: int) -> None:
        dice = self._dice.random()
        if dice < DEATH:
            self._push(SHARD_S / 2, actor, "lost")
            return
        slow = STRAGGLER[1] if dice > 1 - STRAGGLER[0] else 1.0
        self._push(SHARD_S * slow * self._dice.uniform(0.8, 1.2), actor, "done")

    def _event(self, actor: int, what: str) -> Event:
        if what == "born":
            return Born(actor, None)
        if what == "lost":
            self.deaths += 1
            return Lost(actor, "killed.")
        ticket, task = self._queues[actor].popleft()
        if self._queues[actor]:
            self._work(actor)
        self._unproven[actor] += 1
        due = task.method == "prove" or self._unproven[actor] >= PROVE_EVERY
        self._unproven[actor] *= not due
        return Done(ticket, task.key, "proof" if due else None)


class OpenGate:
    def admit(self, actor: int, birth: Any) -> bool:
        return True

    def confirm(self, actor: int, proof: Any) -> None:
        pass


def simulate(actors: int, shards: int) -> dict[str, Any]:
    fleet = SimulatedFleet(seed=0)
    dispatcher = Dispatcher(
        fleet, OpenGate(), num_actors=actors, tasks_per_actor=2, max_attempts=100
    )
    proven = bytearray(shards)
    tasks = (Task(key, f"Shard {key}", "score_shard", (key,)) for key in range(shards))
    dispatcher.start()
    start = time.process_time()
    for result in dispatcher.run(tasks, prove=True):
        if result.proven:
            proven[result.task.key] += 1
    spent = time.process_time() - start
    ideal_s = shards * SHARD_S / actors
    return {
        "actors": actors,
        "shards": shards,
        "deaths": fleet.deaths,
        "lost": proven.count(0),
        "twice": sum(n > 1 for n in proven),
        "shards_per_s": round(shards / spent),
        "virtual_hours": round(fleet.now_s / 3600, 1),
        "share_of_ideal": round(ideal_s / fleet.now_s, 3),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 10, 100, 1_000])
    parser.add_argument("--shards", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument(
        "--result", type=Path, default=Path(__file__).parent / "results" / "scale.json"
    )
    arguments = parser.parse_args()
    logging.getLogger("rayreward").setLevel(logging.ERROR)
    few, *many = arguments.shards
    runs = [simulate(actors, few) for actors in arguments.actors]
    runs += [simulate(max(arguments.actors), shards) for shards in many]
    result = {"machine": platform.machine(), "python": platform.python_version(), "runs": runs}
    arguments.result.write_text(json.dumps(result, indent=1) + "\n")
    print(*runs, sep="\n")
    if any(run["lost"] or run["twice"] for run in runs):
        sys.exit("shards were lost or proven twice")


if __name__ == "__main__":
    main()
