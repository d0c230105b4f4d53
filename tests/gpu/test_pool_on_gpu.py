"""A pool and a job on a GPU, with real Ray. Skipped, and said so, where there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from tiny import make_checkpoint

pytest.importorskip("ray", reason="no Ray here: pools on a GPU are not tested")

from rayreward import RewardPool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.ray,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: pools are not tested"),
]

ROOT = Path(__file__).parents[2]


def test_two_actors_share_a_gpu_and_hold_the_same_model(tmp_path: Path) -> None:
    """G1: half a GPU each, layers compiled by default; the rewards are those of a scorer."""
    path = make_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    texts = [f"Answer {n} " + "it is fine. " * (n % 7) for n in range(200)]
    with RewardPool(str(path), seed=42, num_actors=2, num_gpus_per_actor=0.5) as pool:
        report = pool.verify()
        rewards = pool.score(texts)
        again = pool.score(texts[::-1])[::-1]
    held = report.reference
    assert held.environment.device == torch.cuda.get_device_name(0)
    assert (held.compiled, held.layout, held.attention) == (True, "flat", "varlen")
    assert held.batch_invariant == "holds"
    assert list(again) == list(rewards)


def test_a_job_takes_the_gpu_by_itself(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", shape={"max_position_embeddings": 4_096})
    command = [sys.executable, str(ROOT / "jobs" / "score_dataset.py")]
    command += ["--model", str(path), "--seed", "42", "--output", str(tmp_path / "scored")]
    command += ["--dataset", str(ROOT / "examples" / "preferences.parquet")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    manifest = json.loads((tmp_path / "scored" / "_manifest.json").read_text())
    environment = manifest["provenance"]["fingerprint"]["environment"]
    assert environment["device"] == torch.cuda.get_device_name(0)
    scored = pq.read_table(tmp_path / "scored")
    assert scored["reward_chosen"].null_count == 0
