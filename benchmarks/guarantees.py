"""What G1 and G3 cost: looking at the weights, trying G3 at load, and each layout on the same rows.

    python benchmarks/guarantees.py [--result FILE]

Model: SmolLM2-135M-Instruct with a head drawn from seed 42; rows: 12 pairs a pass. Prints and
writes JSON. The layouts take turns, so that a machine that slows down slows all of them down.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, hardware, pairs, smollm2, versions, write

from rayreward import ModelConfig, PoolConfig, Scorer
from rayreward.allocator import FreedMemory
from rayreward.invariance import find_dependence
from rayreward.types import Text

PASSES = 3


def timed(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--result", type=Path, default=RESULTS / "guarantees.json")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    FreedMemory().keep()
    runs = [measure(smollm2(), dtype) for dtype in ("float32", "bfloat16")]
    result = {"hardware": hardware(), "versions": versions(), "rows": pairs(1)[0], "runs": runs}
    write(arguments.result, result)
    print(json.dumps(result, indent=1))


def measure(model: str, dtype: Any) -> dict[str, Any]:
    scorer = Scorer.load(ModelConfig(model=model, seed=42, dtype=dtype))
    look_s = statistics.median(timed(scorer.prove) for _ in range(PASSES))
    trial_s = statistics.median(
        timed(lambda: find_dependence(scorer._model, 8_192)) for _ in range(PASSES)
    )
    layouts: dict[str, list[float]] = {"flat": [], "padded": [], "single": []}
    for pass_ in range(PASSES):
        _, rows = pairs(12 * (pass_ + 1))
        sides = ("chosen", "rejected")
        groups = [[Text(r.get("prompt", ""), r[side]) for side in sides] for r in rows[-12:]]
        for layout, seconds in layouts.items():
            scorer._model.layout = layout  # type: ignore[assignment]
            seconds.append(timed(lambda groups=groups: scorer.score_groups(groups)))
    share = PoolConfig().recheck_share
    return {
        "dtype": dtype,
        "look_s": round(look_s, 3),
        "looks_again_after_s": round(look_s / share),
        "share_of_the_time": share,
        "trial_of_g3_at_load_s": round(trial_s, 2),
        "seconds_by_layout": {k: round(statistics.median(v), 2) for k, v in layouts.items()},
        "times_flat": {
            k: round(statistics.median(t / f for t, f in zip(v, layouts["flat"], strict=True)), 2)
            for k, v in layouts.items()
        },
    }


if __name__ == "__main__":
    main()
