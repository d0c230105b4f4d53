"""RayReward against what somebody would use instead, on the same rows and the same checkpoint.

    python benchmarks/peers.py [--passes 3] [--dtype float32 bfloat16] [--workload pairs …]

In one process, on one machine, two threads. Every pass scores other rows, and within a pass the
ways of scoring take turns, so that a machine that slows down slows all of them down. What is told
is the median over the passes, and the median ratio to RayReward within a pass. Rewards are
compared, so that nobody wins by being wrong.

The rows are made from the example pairs and from random words, so that nothing has to be fetched.
Model: SmolLM2-135M-Instruct with a head drawn from seed 42.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import transformers
from hh import cpu_name
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline, set_seed

from rayreward import ModelConfig, Scorer
from rayreward.types import Reward, Text

ROOT = Path(__file__).parents[1]
PAIRS = ROOT / "examples" / "formats" / "pairs_text.parquet"
SEED = 42
BATCHES = (4, 16)
"""Batch sizes that a peer may choose from; its best one counts."""

Groups = list[list[str]]
Way = Callable[[Groups], list[float]]


def pairs(pass_: int) -> Groups:
    """Chosen and rejected, from the example pairs; 12 pairs a pass."""
    rows = pq.read_table(PAIRS).to_pylist()
    chosen = rows[pass_ * 12 % len(rows) :][:12]
    return [
        [row.get("prompt", "") + row[side] for side in ("chosen", "rejected")] for row in chosen
    ]


def completions(pass_: int) -> Groups:
    """8 completions of about 64 tokens to a prompt of about 512; 2 prompts a pass."""
    dice = random.Random(pass_)
    return [
        [prompt + words(dice, 64) for _ in range(8)]
        for prompt in (words(dice, 512) for _ in range(2))
    ]


def long(pass_: int) -> Groups:
    """Single texts of about 1,024 tokens; 4 a pass."""
    dice = random.Random(pass_)
    return [[words(dice, 1_024)] for _ in range(4)]


def short(pass_: int) -> Groups:
    """Single texts of about 32 tokens; 96 a pass."""
    dice = random.Random(pass_)
    return [[words(dice, 32)] for _ in range(96)]


WORKLOADS = {"pairs": pairs, "completions": completions, "long": long, "short": short}
SOME = "the of and to in is that for it was on are as with be this from or have by not but"
WORDS = SOME.split()
"""Each is one token with the space before it."""


def words(dice: random.Random, count: int) -> str:
    return "".join(f" {dice.choice(WORDS)}" for _ in range(count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--workload", nargs="+", default=list(WORKLOADS), choices=WORKLOADS)
    parser.add_argument("--result", type=Path, default=ROOT / "benchmarks/results/peers.json")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    source = subprocess.check_output([sys.executable, ROOT / "examples/smollm2.py"], text=True)
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        for dtype in arguments.dtype:
            path = with_head(source.strip(), Path(scratch) / dtype, dtype)
            ways = make_ways(path)
            for workload in arguments.workload:
                runs += measure(ways, workload, dtype, arguments.passes)
    result = {
        "hardware": {"cpu": cpu_name(), "cores": os.cpu_count()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "runs": runs,
    }
    arguments.result.write_text(json.dumps(result, indent=1) + "\n")
    print(as_table(runs))


def with_head(source: str, path: Path, dtype: str) -> str:
    """Saves the checkpoint with its drawn head, so that everybody loads the same."""
    set_seed(SEED)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1)
    model.to(getattr(torch, dtype)).save_pretrained(path)
    AutoTokenizer.from_pretrained(source).save_pretrained(path)
    return str(path)


def make_ways(path: str) -> dict[str, Way]:
    scorer = Scorer.load(ModelConfig(model=path))
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()

    def ours(groups: Groups) -> list[float]:
        outcomes = scorer.score_groups([[Text("", text) for text in group] for group in groups])
        return [o.value if isinstance(o, Reward) else float("nan") for g in outcomes for o in g]

    ways: dict[str, Way] = {"RayReward": ours}
    for size in BATCHES:
        ways[f"plain loop, sorted, batches of {size}"] = plain_loop(model, tokenizer, size)
        ways[f"transformers pipeline, batches of {size}"] = by_pipeline(model, tokenizer, size)
    return ways


@torch.inference_mode()
def forward(model: Any, tokenizer: Any, texts: Sequence[str]) -> list[float]:
    """Source: TRL's GRPOTrainer._calculate_rewards pads and scores like this, too."""
    inputs = tokenizer(list(texts), padding=True, padding_side="right", return_tensors="pt")
    return list(model(**inputs).logits[:, 0].float().tolist())


def plain_loop(model: Any, tokenizer: Any, size: int) -> Way:
    def score(groups: Groups) -> list[float]:
        texts = [text + tokenizer.eos_token for group in groups for text in group]
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        rewards = dict.fromkeys(order, 0.0)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            found = forward(model, tokenizer, [texts[index] for index in chosen])
            rewards.update(zip(chosen, found, strict=True))
        return [rewards[index] for index in range(len(texts))]

    return score


def by_pipeline(model: Any, tokenizer: Any, size: int) -> Way:
    tokenizer.padding_side = "right"
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, batch_size=size)

    def score(groups: Groups) -> list[float]:
        texts = [text + tokenizer.eos_token for group in groups for text in group]
        return [found["score"] for found in classify(texts, function_to_apply="none")]

    return score


def measure(ways: dict[str, Way], workload: str, dtype: str, passes: int) -> list[dict[str, Any]]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    apart = dict.fromkeys(ways, 0.0)
    for pass_ in range(passes):
        groups = WORKLOADS[workload](pass_)
        found = {}
        for name, way in ways.items():
            start = time.perf_counter()
            found[name] = way(groups)
            seconds[name].append(time.perf_counter() - start)
            print(f"{workload} {dtype} pass {pass_}: {name} {seconds[name][-1]:.1f} s", flush=True)
        for name, rewards in found.items():
            pairs_ = zip(rewards, found["RayReward"], strict=True)
            apart[name] = max(apart[name], max(abs(a - b) for a, b in pairs_))
    return [
        {
            "workload": workload,
            "dtype": dtype,
            "way": name,
            "median_s": round(statistics.median(taken), 2),
            "times_rayreward": round(
                statistics.median(
                    t / ours for t, ours in zip(taken, seconds["RayReward"], strict=True)
                ),
                2,
            ),
            "largest_difference": apart[name],
        }
        for name, taken in seconds.items()
    ]


def as_table(runs: Sequence[dict[str, Any]]) -> str:
    lines = ["| workload | dtype | way | median s | × RayReward's time | apart |", "|---" * 6 + "|"]
    for run in runs:
        cells = (run["workload"], run["dtype"], run["way"], run["median_s"])
        lines.append(
            f"| {' | '.join(map(str, cells))} | {run['times_rayreward']:.2f} | "
            f"{run['largest_difference']:.0e} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
