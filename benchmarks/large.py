"""A large job: millions of rows through a tiny model, and what driver and actors hold in memory.

    python benchmarks/large.py [--rows 5000000] [--files 10000] [--shards 20000]

- **job**: rows of a few words, each about eight times in a shard, in Parquet files of a million
  rows and a row group each, through `rayreward score` with two actors of one CPU each and a random
  Llama of one layer. What is measured is all that is not the model: reading, tokenizing, tallying,
  writing, committing. Checked as well: every row is in the output once, in order, with its reward,
  and the driver never imported torch.
- **files**: planning a dataset of so many files of ten rows, in Parquet and in JSON Lines.
- **shards**: the record of a run of so many shards, and taking up a run of which all parts but one
  are committed.

Peak memory is `VmHWM`, of the whole process; memory maps and shared libraries count. Where others
use the machine meanwhile, the load averages say so, and CPU seconds say more than seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from common import RESULTS, as_table, hardware, versions, write
from overhead import WORDS, make_tiny

from rayreward.shards import plan_dataset
from rayreward.types import Attempt, Tally
from rayreward.writing import OutputDirectory

DISTINCT = 500
"""Texts that a file's rows are drawn from: a shard of 4,096 rows holds each about eight times."""

FILE_ROWS = 1_000_000
MB = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--shards", type=int, default=20_000)
    parser.add_argument("--result", type=Path, default=RESULTS / "large.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        result = {
            "hardware": hardware(),
            "versions": versions("ray", "pyarrow"),
            "load_average_before": round(os.getloadavg()[0], 1),
            "files": [
                measure_files(folder / kind, kind, arguments.files) for kind in ("parquet", "jsonl")
            ],
            "shards": measure_shards(folder / "shards", arguments.shards),
            "job": measure_job(folder / "job", arguments.rows),
        }
    result["load_average_after"] = round(os.getloadavg()[0], 1)
    write(arguments.result, result)
    print(as_markdown(result))


def measure_files(folder: Path, kind: str, files: int) -> dict[str, Any]:
    """Seconds and CPU seconds to plan a dataset of small files."""
    folder.mkdir()
    for number in range(files):
        rows = [{"id": 10 * number + row, "text": f"file {number} row {row}"} for row in range(10)]
        path = folder / f"{number:06d}.{kind}"
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    start, cpu = time.perf_counter(), time.process_time()
    plan = plan_dataset(str(folder))
    return {
        "kind": kind,
        "files": files,
        "shards": len(plan.shards),
        "plan_s": round(time.perf_counter() - start, 2),
        "plan_cpu_s": round(time.process_time() - cpu, 2),
    }


def measure_shards(folder: Path, shards: int) -> dict[str, Any]:
    """A run of so many shards of one row, all committed but the last, and what resuming takes."""
    folder.mkdir()
    pq.write_table(
        pa.table({"text": [f"row {row}" for row in range(shards)]}), folder / "x.parquet"
    )
    planned, plan_s = timed(lambda: plan_dataset(str(folder / "x.parquet"), rows_per_shard=1))
    output = OutputDirectory(str(folder / "out"))
    output.create({"rows": planned.rows, "rows_per_shard": planned.rows_per_shard})
    attempts = [_attempt(output, shard) for shard in range(shards - 1)]
    _, commit_s = timed(lambda: [output.promote(attempt) for attempt in attempts])
    again = OutputDirectory(str(folder / "out"))
    _, resume_s = timed(lambda: again.resume(shards))
    assert len(again.parts) == shards - 1
    return {
        "shards": shards,
        "plan_s": round(plan_s, 2),
        "commit_ms_per_shard": round(1e3 * commit_s / shards, 3),
        "resume_s": round(resume_s, 2),
        "ledger_mb": round((folder / "out/_rayreward/ledger.jsonl").stat().st_size / MB, 1),
    }


def _attempt(output: OutputDirectory, shard: int) -> Attempt:
    path = output.attempts / f"{shard}.parquet"
    path.write_bytes(b"x")
    return Attempt(shard, str(path), 1, "0" * 64, Tally(rows=1, rewards=1, tokens=5))


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def measure_job(folder: Path, rows: int) -> dict[str, Any]:
    """A whole job in a process of its own, watched from outside."""
    folder.mkdir()
    make_tiny(folder / "model", layers=1)
    (folder / "in").mkdir()
    for number, start in enumerate(range(0, rows, FILE_ROWS)):
        ids = range(start, min(start + FILE_ROWS, rows))
        table = pa.table({"id": ids, "text": list(islice(texts(number), len(ids)))})
        pq.write_table(table, folder / "in" / f"{number:03d}.parquet")
        del table
    _, plan_s = timed(lambda: plan_dataset(str(folder / "in")))
    start = time.perf_counter()
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, *flags(folder)], stdout=subprocess.PIPE
    )
    actors = watch(driver.pid)
    wall_s = time.perf_counter() - start
    assert driver.stdout is not None
    told = json.loads(driver.stdout.read().splitlines()[-1])
    if driver.wait() or told["torch"]:
        raise SystemExit(f"The job ended with {driver.returncode}; torch in the driver: {told}")
    check_rows(folder / "out", rows)
    manifest = json.loads((folder / "out" / "_manifest.json").read_text())
    return {
        "rows": rows,
        "actors": len(actors),
        "parts": len(manifest["parts"]),
        "input_mb": round(size(folder / "in") / MB),
        "output_mb": round(size(folder / "out") / MB),
        "plan_s": round(plan_s, 2),
        "wall_s": round(wall_s, 1),
        "score_s": round(manifest["elapsed_s"], 1),
        "rows_per_s": round(rows / manifest["elapsed_s"]),
        "share_of_time_in_the_model": round(manifest["busy_share"], 3),
        "driver_peak_mb": round(told["peak_kb"] / 1024),
        "driver_cpu_s": round(told["cpu_s"], 1),
        "actor_peak_mb": [round(peak / 1024) for peak, _ in actors],
        "actor_cpu_s": [round(cpu, 1) for _, cpu in actors],
        "rows_per_cpu_s": round(rows / sum(cpu for _, cpu in actors)),
    }


DRIVER = """
import json, sys, time
from rayreward import cli
code = cli.main(sys.argv[1:])
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
peak = int(status["VmHWM"].split()[0])
told = {"peak_kb": peak, "cpu_s": time.process_time(), "torch": "torch" in sys.modules}
print(json.dumps({"code": code, **told}))
sys.exit(code)
"""


def flags(folder: Path) -> list[str]:
    where = ["--model", folder / "model", "--dataset", folder / "in", "--output", folder / "out"]
    how = ["--seed", 1, "--num-actors", 2, "--num-cpus-per-actor", 1, "--progress", "lines"]
    return ["score", *map(str, where + how)]


def watch(pid: int) -> list[tuple[int, float]]:
    """Peak memory in KB and CPU seconds of each actor of a driver, once the driver has ended."""
    driver = psutil.Process(pid)
    found: dict[int, tuple[int, float]] = {}
    while driver.status() != psutil.STATUS_ZOMBIE:
        for process in driver.children(recursive=True):
            with contextlib.suppress(psutil.Error, OSError, KeyError):
                if process.cmdline()[0].startswith("ray::RewardActor"):
                    status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                    fields = dict(line.split(":", 1) for line in status)
                    times = process.cpu_times()
                    peak = int(fields["VmHWM"].split()[0])
                    found[process.pid] = peak, times.user + times.system
        time.sleep(1)
    return list(found.values())


def check_rows(output: Path, rows: int) -> None:
    before = 0
    for part in sorted(output.glob("part-*.parquet")):
        table = pq.read_table(part, columns=["id", "reward"])
        if table["id"].to_pylist() != list(range(before, before + len(table))):
            raise SystemExit(f"{part} does not hold the rows from {before} on.")
        if table["reward"].null_count:
            raise SystemExit(f"{part} has rows without a reward.")
        before += len(table)
    if before != rows:
        raise SystemExit(f"{before} rows came out and {rows} went in.")


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.parquet"))


def texts(seed: int) -> Iterator[str]:
    draw = random.Random(seed)
    known = [" ".join(draw.choices(WORDS, k=draw.randint(2, 4))) for _ in range(DISTINCT)]
    while True:
        yield from draw.choices(known, k=1_000)


def as_markdown(result: dict[str, Any]) -> str:
    job, shards = result["job"], result["shards"]
    rows = [
        [f"planning {run['files']:,} files, {run['kind']}", f"{run['plan_s']} s"]
        for run in result["files"]
    ]
    rows += [
        [f"planning {shards['shards']:,} shards", f"{shards['plan_s']} s"],
        ["committing a part", f"{shards['commit_ms_per_shard']} ms"],
        [f"taking up {shards['shards']:,} parts", f"{shards['resume_s']} s"],
        [f"a job of {job['rows']:,} rows", f"{job['score_s']} s, {job['rows_per_s']:,} rows/s"],
        ["its rows for each of the actors' CPU seconds", f"{job['rows_per_cpu_s']:,}"],
        ["planning it", f"{job['plan_s']} s"],
        ["the driver's peak memory", f"{job['driver_peak_mb']} MB"],
        ["an actor's peak memory", f"{max(job['actor_peak_mb'])} MB"],
    ]
    return as_table(["", ""], rows)


if __name__ == "__main__":
    main()
