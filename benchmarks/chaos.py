"""Kills actors, machines, the driver and the disk while a job runs, and compares what comes out.

    python benchmarks/chaos.py [--kills 200] [--seed 0] [--rows 2000]

A job (`rayreward score`) runs on a Ray cluster of a head and two machines, all on this one. On a
seeded schedule something is killed: an actor or the driver (SIGKILL), the driver as `ray job stop`
does it (SIGTERM), a whole machine (its raylet, SIGKILL; another joins), or the disk of an actor or
of the driver (RLIMIT_FSIZE: from then on every write fails). When the driver ends before the job
does, the same command is run again, as a user would. When the job is finished, its output is
compared with that of an undisturbed run, and a job in another directory begins, until there were
enough kills.

Prints kills, rows lost, rows twice and parts with other bytes; writes the same as JSON. Exit code 1
unless the last three are 0. Model: a tiny random Llama; rows: made-up pairs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from common import RESULTS, ROOT, as_table, hardware, versions, write

sys.path.append(str(ROOT / "tests"))

import psutil
from ray.cluster_utils import Cluster
from tiny import make_checkpoint

RAYREWARD = Path(sys.executable).with_name("rayreward")
ROWS_PER_SHARD = 20
FILES = 4
BUSY = 0.7
"""Share of the kills that come soon after a part; the others come at any time, and hit what is
starting, too."""

PAUSES_S = {True: 0.3, False: 10.0}
"""The longest pause before a kill, soon after a part and at any time."""

PATIENCE_S = 300.0
"""A job that gets nowhere for so long has failed."""

MACHINES = 2
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "and", "answers")
FAULTS = {"actor": 8, "machine": 2, "driver": 3, "driver, SIGTERM": 2, "disk of an actor": 1}
FAULTS["disk of the driver"] = 1
"""What is killed, and how often in so many kills of the sum."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=2_000)
    parser.add_argument("--result", type=Path, default=RESULTS / "chaos.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch, cluster() as machines:
        chaos = Chaos(Path(scratch), machines, arguments)
        found = chaos.run()
    result = {
        "hardware": hardware(),
        "versions": versions("ray"),
        "seed": arguments.seed,
        "rows": arguments.rows,
        "rows_per_shard": ROWS_PER_SHARD,
        **found,
    }
    write(arguments.result, result)
    print(as_table(("what", "how many"), found["kills"].items()))
    told = ("jobs", "driver_starts", "rows_lost", "rows_twice", "parts_with_other_bytes")
    print(as_table(("found", ""), [(name.replace("_", " "), found[name]) for name in told]))
    sys.exit(any(found[name] for name in told[2:]))


@contextmanager
def cluster() -> Iterator[Cluster]:
    """A head without room for actors, and machines with room for one each."""
    os.environ.setdefault("RAY_TMPDIR", tempfile.mkdtemp(prefix="r", dir="/tmp"))  # short: sockets
    os.environ["RAY_AUTH_MODE"] = "disabled"
    machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for _ in range(MACHINES):
            machines.add_node(num_cpus=1, wait=False)
        yield machines
    finally:
        machines.shutdown()


class Chaos:
    def __init__(self, scratch: Path, machines: Cluster, arguments: argparse.Namespace) -> None:
        self.scratch = scratch
        self.machines = machines
        self.arguments = arguments
        self.dice = random.Random(arguments.seed)
        self.kills: Counter[str] = Counter()
        self.starts = 0
        self.model = str(make_checkpoint(scratch / "model"))
        self.dataset = write_pairs(scratch / "data", arguments.rows)

    def run(self) -> dict[str, Any]:
        started = time.monotonic()
        calm = self.scratch / "calm"
        self.finish(calm, disturbed=False)
        expected = parts(calm)
        tell(f"undisturbed: {len(expected)} parts in {time.monotonic() - started:.0f} s")
        found: Counter[str] = Counter()
        jobs = 0
        while self.kills.total() < self.arguments.kills:
            output = self.scratch / f"job-{jobs}"
            self.finish(output, disturbed=True)
            jobs += 1
            compared = compare(output, expected, self.arguments.rows)
            found.update(compared)
            tell(f"job {jobs}: {self.kills.total()} kills so far, {dict(compared)}")
        return {
            "jobs": jobs,
            "driver_starts": self.starts,
            "kills": {**self.kills, "in all": self.kills.total()},
            **{name: found[name] for name in compare(calm, expected, self.arguments.rows)},
            "elapsed_s": round(time.monotonic() - started),
        }

    def finish(self, output: Path, *, disturbed: bool) -> None:
        """Runs the job, again and again if need be, until it is finished."""
        deadline = Deadline(output, self.machines)
        while not (output / "_SUCCESS").exists():
            driver = self.start(output)
            try:
                self.disturb(driver, deadline) if disturbed else driver.wait(PATIENCE_S)
            finally:
                if driver.poll() is None:
                    driver.kill()
                said = driver.stderr.read().decode(errors="replace").strip()
                driver.wait()
            deadline.said = said
            if driver.returncode and not disturbed:
                raise SystemExit(f"The undisturbed job failed: {said}")
            if driver.returncode == 2:
                raise SystemExit(f"The job was refused: {said}")

    def start(self, output: Path) -> subprocess.Popen[bytes]:
        self.starts += 1
        command = [str(RAYREWARD), "score", "--model", self.model, "--seed", "1"]
        command += ["--dataset", self.dataset, "--output", str(output), "--progress", "none"]
        command += ["--rows-per-shard", str(ROWS_PER_SHARD), "--num-actors", str(MACHINES)]
        command += ["--num-cpus-per-actor", "1", "--ray-address", self.machines.address]
        # looks at the weights after every shard, so that parts are there early on
        command += ["--recheck-share", "1", "--placement-timeout-s", "120"]
        return subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    def disturb(self, driver: subprocess.Popen[bytes], deadline: Deadline) -> None:
        """Kills one thing after the other until the driver has ended."""
        while True:
            busy = self.dice.random() < BUSY
            if busy:
                self.await_part(driver, deadline)
            try:
                driver.wait(self.dice.uniform(0, PAUSES_S[busy]))
                return
            except subprocess.TimeoutExpired:
                deadline.check()
            if self.kills.total() < self.arguments.kills:
                [what] = self.dice.choices(list(FAULTS), list(FAULTS.values()))
                if self.strike(what, driver):
                    self.kills[what] += 1

    @staticmethod
    def await_part(driver: subprocess.Popen[bytes], deadline: Deadline) -> None:
        """Waits until a part is added, or the driver ends."""
        before = deadline.check()
        while driver.poll() is None and deadline.check() == before:
            time.sleep(0.02)

    def strike(self, what: str, driver: subprocess.Popen[bytes]) -> bool:
        """Returns whether there was something to kill."""
        actors = actors_of(self.machines)
        kill: dict[str, Callable[[], Any]] = {
            "actor": lambda: self.dice.choice(actors).kill(),
            "machine": self.replace_machine,
            "driver": driver.kill,
            "driver, SIGTERM": driver.terminate,
            "disk of an actor": lambda: fill_disk(self.dice.choice(actors).pid),
            "disk of the driver": lambda: fill_disk(driver.pid),
        }
        if what.endswith("actor") and not actors:
            return False
        try:
            kill[what]()
        except (psutil.NoSuchProcess, ProcessLookupError):
            return False
        return True

    def replace_machine(self) -> None:
        machine = self.dice.choice(sorted(self.machines.worker_nodes, key=lambda n: n.node_id))
        self.machines.remove_node(machine, allow_graceful=False)
        self.machines.add_node(num_cpus=1, wait=False)


class Deadline:
    """Fails when no part was added for too long."""

    def __init__(self, output: Path, machines: Cluster) -> None:
        self.output = output
        self.machines = machines
        self.count, self.since = -1, time.monotonic()
        self.said = ""

    def check(self) -> int:
        """How many parts there are."""
        count = len(list(self.output.glob("part-*")))
        if count != self.count:
            self.count, self.since = count, time.monotonic()
        if time.monotonic() - self.since > PATIENCE_S:
            raise SystemExit(
                f"The job got nowhere for {PATIENCE_S:.0f} s, at {count} parts. Machines: "
                f"{raylets_of(self.machines)}; actors: {actors_of(self.machines)}; the driver "
                f"before this one said: {self.said}"
            )
        return count


def actors_of(machines: Cluster) -> list[psutil.Process]:
    """The actors of this cluster: other clusters of this computer have some, too."""
    found = []
    for raylet in raylets_of(machines):
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in raylet.children():
                with contextlib.suppress(psutil.NoSuchProcess, IndexError):
                    if child.cmdline()[0].startswith("ray::RewardActor"):
                        found.append(child)
    return found


def raylets_of(machines: Cluster) -> list[psutil.Process]:
    """The process that a machine is."""
    found = []
    for machine in machines.worker_nodes:
        for raylet in machine.all_processes.get("raylet", ()):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(raylet.process.pid))
    return found


def fill_disk(pid: int) -> None:
    """From now on the process can't add a byte to any file."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def write_pairs(directory: Path, rows: int) -> str:
    directory.mkdir()
    dice = random.Random(0)

    def text() -> str:
        return " ".join(dice.choice(WORDS) for _ in range(dice.randint(3, 12)))

    table = pa.table(
        {
            "id": list(range(rows)),
            "prompt": [text() + " " for _ in range(rows)],
            "chosen": [text() for _ in range(rows)],
            "rejected": [text() for _ in range(rows)],
        }
    )
    size = -(-rows // FILES)
    for number in range(FILES):
        pq.write_table(table.slice(number * size, size), directory / f"{number}.parquet")
    return str(directory)


def parts(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(output.glob("part-*.parquet"))}


def compare(output: Path, expected: dict[str, bytes], rows: int) -> Counter[str]:
    found = parts(output)
    ids = Counter(pq.read_table(output, columns=["id"])["id"].to_pylist())
    names = expected.keys() | found.keys()
    return Counter(
        rows_lost=len(set(range(rows)) - ids.keys()),
        rows_twice=sum(count - 1 for count in ids.values()),
        parts_with_other_bytes=sum(found.get(name) != expected.get(name) for name in names),
    )


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
