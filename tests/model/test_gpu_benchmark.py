"""benchmarks/gpu.py runs from end to end, on a CPU and with a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *arguments]
    as_on_a_gpu = os.environ | {"CXX": "none"}  # no compiled kernels
    return subprocess.run(command, capture_output=True, text=True, check=False, env=as_on_a_gpu)


def test_smoke_measures_every_way_and_finds_their_rewards_alike(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    done = run("--smoke", "--result", str(path))
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert result["left_out"] == []
    assert result["float32"]["within_tolerance"]
    assert result["models"]["tiny"]["taken"] == "flat by blocks"
    assert set(result["models"]["tiny"]["g3"]) == {"flat by blocks", "padded"}
    runs = result["runs"]
    assert all(run["within_tolerance"] and run["repeats"] == 1 for run in runs)
    for workload in ("pairs", "completions", "singles"):
        ways = [run["way"] for run in runs if run["workload"] == workload]
        assert max(Counter(ways).values()) == 1
        assert {way.split()[0].strip(",") for way in ways} == {"RayReward", "transformers"}
    tokens = {(run["workload"], run["way"]): run["tokens_run"] for run in runs}
    shared = tokens["completions", "RayReward flat by blocks, shared, 1,024 tokens"]
    assert shared == 512 + 8 * 64
    assert tokens["completions", "transformers, sorted by length, batches of 8"] == 8 * 576
    assert "| tiny | pairs | RayReward flat by blocks, shared" in done.stdout


def test_what_does_not_fit_into_the_budget_is_named(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    done = run("--smoke", "--budget-s", "0", "--result", str(path))
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert (result["float32"], result["runs"], result["models"]) == ({}, [], {})
    assert [line.split(":")[0] for line in result["left_out"]] == ["float32", "tiny"]
