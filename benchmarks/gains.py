"""What each way of being fast gains: the same pairs with it and without it, two threads.

    python benchmarks/gains.py [--pairs 16] [--passes 5]

Model: SmolLM2-135M-Instruct with a head drawn from seed 42. Every pass scores other pairs, and in a
pass the ways take turns, each time in another order. What is told is the median, over the passes,
of the time without a thing against the time with it. Rewards are compared.

Keeping freed memory is a setting of the whole process: the ways without it run in one of their own.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rayreward.threads import wait_briefly

wait_briefly()  # as in an actor

import torch
from common import RESULTS, as_table, hardware, pairs, smollm2, versions, write

from rayreward import ModelConfig, Scorer, model, panels
from rayreward.allocator import FreedMemory
from rayreward.types import Reward, Text

ORDERED = "weights in the order of their products"
OWN_PRODUCTS = "a kernel of our own for linear layers"
"""Only where it is taken: on processors with AVX2 and no AVX-512."""

WITHOUT: dict[str, str] = {
    ORDERED: "weights in plain order, by F.linear",
    OWN_PRODUCTS: "oneDNN's, weights in its order",
    "a kernel of our own for attention": "blocks, by SDPA's kernel",
    "prefixes once": "prefixes again for each text",
    "pooled tokens only, after the last attention": "all tokens",
    "nothing after the pooled token": "an EOS that is looked past",
    "8,192 tokens a batch": "2,048 tokens",
    "all of it, and no padding": "transformers' own forward, padded and sorted by length",
}

COMPILED = "layers compiled, if asked to"
"""The only thing that is not there by default."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=16, help="of a pass")
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--result", type=Path, default=RESULTS / "gains.json")
    parser.add_argument("--seconds-alone", action="store_true", help="used by the script itself")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    if arguments.seconds_alone:
        print(json.dumps([alone(dtype, arguments) for dtype in arguments.dtype]))
        return
    memory = measure_memory(arguments)  # before this process keeps its own
    FreedMemory().keep()
    gains = [gain for dtype in arguments.dtype for gain in measure(dtype, arguments)]
    source, _ = pairs(1)
    result = {
        "hardware": hardware(),
        "versions": versions(),
        "pairs": f"{arguments.pairs} of {source} a pass, {arguments.passes} passes",
        "gains": [*memory, *gains],
    }
    write(arguments.result, result)
    rows = [(g["dtype"], g["what"], g["instead_of"], g["gain"]) for g in result["gains"]]
    print(as_table(("dtype", "what", "instead of", "times as fast"), rows))


def groups(arguments: argparse.Namespace, pass_: int) -> list[list[Text]]:
    _, rows = pairs(arguments.pairs * (pass_ + 1))
    chosen = rows[-arguments.pairs :]
    return [[Text(r.get("prompt", ""), r[s]) for s in ("chosen", "rejected")] for r in chosen]


def load(dtype: str, **settings: Any) -> Scorer:
    config = ModelConfig(model=smollm2(), seed=42, dtype=dtype, **settings)  # type: ignore[arg-type]
    return Scorer.load(config)


def rewards(scorer: Scorer, rows: list[list[Text]]) -> list[float]:
    found = scorer.score_groups(rows)
    return [o.value for group in found for o in group if isinstance(o, Reward)]


def measure(dtype: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    ours = load(dtype)
    with patch.object(model, "pack_linear_layers", lambda *_: None):
        plain = load(dtype)
    with patch.object(model, "find_kernels", lambda: "none"):
        blocks = load(dtype)
    compiled = load(dtype, torch_compile=True)
    unshared, small = load(dtype, share_prefixes=False), load(dtype, max_batch_tokens=2_048)

    def padded(rows: list[list[Text]]) -> list[float]:
        with (
            patch.object(plain._model, "layout", "padded"),
            patch.object(plain, "_max_batch_tokens", 1_024),
        ):
            return rewards(plain, rows)

    def all_tokens(rows: list[list[Text]]) -> list[float]:
        with patch.object(ours._model, "_last_attention", None):
            return rewards(ours, rows)

    def whole_texts(rows: list[list[Text]]) -> list[float]:
        with patch.object(ours._model, "needed", lambda ids: ids):
            return rewards(ours, rows)

    ways: dict[str, Callable[[list[list[Text]]], list[float]]] = {
        "": lambda rows: rewards(ours, rows),
        ORDERED: lambda rows: rewards(plain, rows),
        "a kernel of our own for attention": lambda rows: rewards(blocks, rows),
        "prefixes once": lambda rows: rewards(unshared, rows),
        "pooled tokens only, after the last attention": all_tokens,
        "nothing after the pooled token": whole_texts,
        "8,192 tokens a batch": lambda rows: rewards(small, rows),
        "all of it, and no padding": padded,
    }
    if panels.is_faster():
        with patch.object(panels, "is_faster", lambda: False):
            by_onednn = load(dtype)
        ways[OWN_PRODUCTS] = lambda rows: rewards(by_onednn, rows)
    seconds, apart = take_turns(
        {**ways, COMPILED: lambda rows: rewards(compiled, rows)}, dtype, arguments
    )
    gained = {
        "dtype": dtype,
        "what": COMPILED,
        "instead_of": "as they are",
        "gain": ratio(seconds[""], seconds[COMPILED]),
        "largest_difference": apart[COMPILED],
    }
    return [
        gained,
        *(
            {
                "dtype": dtype,
                "what": what,
                "instead_of": WITHOUT[what],
                "gain": ratio(seconds[what], seconds[""]),
                "largest_difference": apart[what],
            }
            for what in ways
            if what
        ),
    ]


def take_turns(
    ways: dict[str, Any], dtype: str, arguments: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, float]]:
    seconds: dict[str, list[float]] = {what: [] for what in ways}
    apart = dict.fromkeys(ways, 0.0)
    dice = random.Random(0)
    for pass_ in range(arguments.passes):
        rows, found = groups(arguments, pass_), {}
        for what in dice.sample(list(ways), len(ways)):
            start = time.perf_counter()
            found[what] = ways[what](rows)
            seconds[what].append(time.perf_counter() - start)
        for what, values in found.items():
            differences = (abs(a - b) for a, b in zip(values, found[""], strict=True))
            apart[what] = max(apart[what], *differences)
        print(f"{dtype} pass {pass_ + 1} of {arguments.passes} done", file=sys.stderr, flush=True)
    return seconds, apart


def measure_memory(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """With and without kept memory, in processes that take turns."""
    with_it, without = [], []
    for _ in range(3):
        without.append(in_process_of_its_own(arguments, keep=False))
        with_it.append(in_process_of_its_own(arguments, keep=True))
    return [
        {
            "dtype": dtype,
            "what": "freed memory kept",
            "instead_of": "handed back to the system",
            "gain": ratio([run[n] for run in without], [run[n] for run in with_it]),
            "largest_difference": 0.0,
        }
        for n, dtype in enumerate(arguments.dtype)
    ]


def in_process_of_its_own(arguments: argparse.Namespace, *, keep: bool) -> list[float]:
    code = "import gains, rayreward.allocator as a\n"
    code += "a.FreedMemory().keep()\n" if keep else ""
    command = [sys.executable, "-c", code + "gains.main()", "--seconds-alone"]
    command += ["--pairs", str(arguments.pairs), "--passes", str(arguments.passes)]
    command += ["--dtype", *arguments.dtype]
    done = subprocess.run(
        command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True
    )
    seconds: list[float] = json.loads(done.stdout)
    return seconds


def alone(dtype: str, arguments: argparse.Namespace) -> float:
    """Seconds of all passes but the first, which finds no freed memory yet."""
    scorer, seconds = load(dtype), []
    for pass_ in range(arguments.passes):
        rows = groups(arguments, pass_)
        start = time.perf_counter()
        rewards(scorer, rows)
        seconds.append(time.perf_counter() - start)
    return sum(seconds[1:])


def ratio(without: list[float], with_it: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(without, with_it, strict=True)), 2)


if __name__ == "__main__":
    main()
