"""Scores the 2,312 pairs of hh-harmless-test through the job and times it.

    python benchmarks/hh.py [--dataset FILE] [--dtype float32]

The pairs are `harmless-base/test.jsonl.gz` of hh-rlhf (MIT), which is not part of this project: the
file is looked for beside the checkout, in shared/data/, unless --dataset names it.

Model: SmolLM2-135M-Instruct with a head drawn from seed 42. Runs `rayreward score` as a user
would, in a process of its own; writes what it saw, with hardware and versions, as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

ROOT = Path(__file__).parents[1]
DATASET = ROOT.parent / "shared" / "data" / "hh-harmless-test.jsonl.gz"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", type=Path, default=DATASET)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--result", type=Path, default=ROOT / "benchmarks" / "results" / "hh.json")
    arguments = parser.parse_args()
    if not arguments.dataset.exists():
        sys.exit(f"{arguments.dataset} is not there; pass --dataset with a file of pairs")
    with tempfile.TemporaryDirectory() as scratch:
        seconds = run(arguments, Path(scratch) / "out")
        result = summarize(Path(scratch) / "out", arguments, seconds)
    arguments.result.parent.mkdir(exist_ok=True)
    arguments.result.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def run(arguments: argparse.Namespace, output: Path) -> float:
    """Runs the job; returns the seconds from its start to its end."""
    model = subprocess.check_output([sys.executable, ROOT / "examples" / "smollm2.py"], text=True)
    command = [str(Path(sys.executable).with_name("rayreward")), "score", "--seed", "42"]
    command += ["--model", model.strip(), "--dataset", str(arguments.dataset)]
    command += ["--output", str(output), "--dtype", arguments.dtype]
    start = time.monotonic()
    subprocess.run(command, check=True)
    return time.monotonic() - start


def summarize(output: Path, arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    manifest = json.loads((output / "_manifest.json").read_text())
    rewards = pq.read_table(output, columns=["reward_chosen", "reward_rejected"])
    tally = manifest["tally"]
    return {
        "workload": f"{arguments.dataset.name}: {tally['pairs']} pairs, SmolLM2-135M, seed 42",
        "dtype": arguments.dtype,
        "rows": tally["rows"],
        "rows_without_reward": rewards["reward_chosen"].null_count
        + rewards["reward_rejected"].null_count,
        "tokens": tally["tokens"],
        "scoring_s": round(manifest["elapsed_s"], 1),
        "whole_job_s": round(seconds, 1),
        "tokens_per_s": round(tally["tokens"] / manifest["elapsed_s"]),
        "pairs_per_s": round(tally["pairs"] / manifest["elapsed_s"], 2),
        "accuracy": manifest["accuracy"],
        "ties": tally["ties"],
        "model_busy": round(manifest["busy_share"], 3),
        "mean_margin": manifest["mean_margin"],
        "head": manifest["provenance"]["fingerprint"]["head"],
        "hardware": {"cpu": cpu_name(), "cores": os.cpu_count(), "machine": platform.machine()},
        "environment": manifest["provenance"]["fingerprint"]["environment"],
    }


def cpu_name() -> str:
    """The processor's name, as the system has it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
