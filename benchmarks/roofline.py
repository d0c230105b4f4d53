"""How close to the hardware: a model's FLOP/s while it scores, against those of its bare products.

    python benchmarks/roofline.py [--pairs 24] [--passes 5] [--dtype float32 bfloat16]

On a CPU with two threads. Model: SmolLM2-135M-Instruct with a head drawn from seed 42; rows: pairs
of hh-harmless-test where they lie beside the checkout, else the example pairs, others in every
pass. FLOPs of a pass = 2 · parameters · rows of each linear layer of the body, as it was called,
the filling of the stream included; beside them, 4 · heads · D for each query and each key that it
sees, in each layer. Shares are given without these and with them: the first says how close the
layers come to their bare products, the second counts all that a model has to multiply (as in
Chowdhery et al., 2022, appendix B). Compiled layers, which can't be looked into, multiply the same.
Freed memory is kept, as in an actor.

The bare products are those of the body's linear layers, each shape as often as it occurs, 2,048
rows at a time: by `F.linear`, and by oneDNN with weights that were put into its order beforehand.
They take turns with scoring, so that a machine that slows down slows all of them down; medians
count, and shares are taken within a turn. The products find their weights in the caches more often
than a model does.

A profile of one more pass without sharing, compiled and not, tells where the time goes: torch's
operators and compiled loops by their own CPU time, sorted into kinds, and what is left of the wall
clock, which is Python and tokenizing. Profiling takes time itself, so look at the shares, not at
the seconds.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rayreward.threads import wait_briefly

wait_briefly()  # as in an actor

import torch
import torch._inductor.config
from common import (
    RESULTS,
    as_table,
    hardware,
    linear_shapes,
    pairs,
    smollm2,
    stream_tokens,
    versions,
    write,
)
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, PretrainedConfig

from rayreward import ModelConfig, Scorer, panels
from rayreward.allocator import FreedMemory
from rayreward.packing import PackedLinear
from rayreward.types import Branch, Text

ROWS = 2_048
THREADS = 2
SIDES = ("chosen", "rejected")
KINDS = {
    "linear layers": r"linear|addmm|::mm$",
    "attention": r"scaled_dot_product|bmm|softmax|attention",
    "compiled loops": r"cpp_fused",
    "gather and scatter": r"index|gather|scatter|embedding|select",
    "elementwise": r"::(add|sub|mul|div|neg|pow|rsqrt|silu|mean|sum|cos|sin|cat|copy|fill|where)",
}
"""Which operators belong together: the first pattern that fits. Copies change type or order."""

_COMPILED = ", compiled"

Groups = list[list[Text]]


class Counting:
    """Counts what a scorer's linear layers multiply, and the tokens that run."""

    def __init__(self, scorer: Scorer, config: PretrainedConfig) -> None:
        if scorer._model.layout != "flat":
            raise SystemExit("The flat stream is not taken here; its layers can't be counted.")
        self.flops = self.attention_flops = self.tokens = 0
        self._flops_of_a_key = 4 * config.hidden_size * config.num_hidden_layers
        for module in scorer._model._module.modules():
            if isinstance(module, PackedLinear):
                module.register_forward_hook(self._count)
        self._sizes = scorer._model.sizes
        self._rewards = scorer._rewards
        scorer._rewards = self  # type: ignore[assignment]

    def __call__(self, batch: Sequence[Branch]) -> Any:
        self.tokens += stream_tokens(batch, self._sizes)
        keys = sum(sum(range(text.shared + 1, len(text.ids) + 1)) for text in batch)
        self.attention_flops += keys * self._flops_of_a_key
        return self._rewards(batch)

    def _count(self, layer: PackedLinear, args: tuple[torch.Tensor], _result: Any) -> None:
        rows = args[0].numel() // args[0].shape[-1]
        self.flops += 2 * rows * math.prod(layer.weight.shape)


class Products:
    """The body's linear layers without anything around them, each shape once."""

    def __init__(self, shapes: Counter[tuple[int, int]], dtype: torch.dtype) -> None:
        self.flops = sum(2 * ROWS * rows * columns * n for (rows, columns), n in shapes.items())
        self._times = list(shapes.values())
        self._rows = [torch.randn(ROWS, columns).to(dtype) for _, columns in shapes]
        plain = [nn.Linear(*shape[::-1], bias=False, dtype=dtype) for shape in shapes]
        plain = [layer.requires_grad_(False) for layer in plain]
        with patch.object(panels, "is_faster", lambda: False):
            ordered: list[nn.Module] = [PackedLinear(layer) for layer in plain]
        self._ways: dict[str, list[nn.Module]] = {"F.linear": plain, "oneDNN, ordered": ordered}
        if panels.is_faster():
            self._ways["our own kernel"] = [PackedLinear(layer) for layer in plain]

    def rates(self) -> dict[str, float]:
        """FLOP/s of the whole body, were there nothing else."""
        return {
            name: self.flops / sum(map(self._seconds, self._times, self._calls(layers)))
            for name, layers in self._ways.items()
        }

    def _calls(self, layers: list[nn.Module]) -> list[Callable[[], Any]]:
        return [partial(layer, rows) for layer, rows in zip(layers, self._rows, strict=True)]

    @staticmethod
    def _seconds(times: int, layer: Callable[[], Any]) -> float:
        """What a layer takes that occurs so many times; a few calls are timed."""
        layer()
        return times * statistics.median(timed(layer) for _ in range(5))


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=24, help="in a pass")
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--result", type=Path, default=RESULTS / "roofline.json")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch._inductor.config.cpp.enable_kernel_profile = True
    FreedMemory().keep()
    source, rows = pairs(arguments.pairs * arguments.passes)
    groups = [[Text("", row.get("prompt", "") + row[side]) for side in SIDES] for row in rows]
    passes = [groups[at : at + arguments.pairs] for at in range(0, len(groups), arguments.pairs)]
    runs = [measure(smollm2(), dtype, passes) for dtype in arguments.dtype]
    result = {
        "hardware": hardware(),
        "versions": versions(),
        "threads": THREADS,
        "workload": f"{arguments.passes} passes over {arguments.pairs} pairs each of {source}",
        "rows_of_a_product": ROWS,
        "runs": runs,
    }
    write(arguments.result, result)
    print(as_markdown(runs))


def measure(model: str, dtype: Any, passes: Sequence[Groups]) -> dict[str, Any]:
    config = AutoConfig.from_pretrained(model)
    shapes = linear_shapes(config)
    products = Products(shapes, getattr(torch, dtype))
    scorers = {
        f"{way}{suffix}": load(model, dtype, share_prefixes=way == "shared", torch_compile=compiled)
        for suffix, compiled in (("", False), (_COMPILED, True))
        for way in ("unshared", "shared")
    }
    counts = {w: Counting(s, config) for w, s in scorers.items() if not w.endswith(_COMPILED)}
    rates: dict[str, list[float]] = {}
    rates_with_attention: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    tokens: Counter[str] = Counter()
    for scorer in scorers.values():
        scorer.score_groups(passes[0])  # warms up
    for groups in passes:
        for way, scorer in scorers.items():
            for name, rate in products.rates().items():
                rates.setdefault(name, []).append(rate)
            counting = counts[way.removesuffix(_COMPILED)]
            if way in counts:
                counting.tokens = counting.flops = counting.attention_flops = 0
            taken = timed(partial(scorer.score_groups, groups))
            seconds.setdefault(way, []).append(taken)
            rates.setdefault(way, []).append(counting.flops / taken)
            with_attention = counting.flops + counting.attention_flops
            rates_with_attention.setdefault(way, []).append(with_attention / taken)
            tokens[way] += counting.tokens
    bare = {name: rates.pop(name) for name in list(rates) if name not in scorers}
    return {
        "dtype": dtype,
        "linear_parameters": sum(math.prod(shape) * n for shape, n in shapes.items()),
        "products_gflops": {n: round(statistics.median(r) / 1e9, 1) for n, r in bare.items()},
        "ways": [
            {
                "way": way,
                "tokens_run": tokens[way],
                "median_s": round(statistics.median(seconds[way]), 2),
                **seen(rates[way], bare, at, len(scorers)),
                "with_attention": seen(rates_with_attention[way], bare, at, len(scorers)),
            }
            for at, way in enumerate(scorers)
        ],
        "profiles": {
            way: where_time_goes(partial(scorers[way].score_groups, passes[-1]))
            for way in ("unshared", f"unshared{_COMPILED}")
        },
    }


def load(model: str, dtype: Any, **settings: bool) -> Scorer:
    config = ModelConfig(model=model, seed=42, dtype=dtype, **settings)
    return Scorer.load(config, "cpu")


def seen(
    rates: Sequence[float], bare: dict[str, list[float]], at: int, ways: int
) -> dict[str, Any]:
    """A way's median rate, and the median of its shares of bare products beside it.

    The bare products were measured before each way in turn, of which this is number `at`.
    """
    return {
        "gflops": round(statistics.median(rates) / 1e9, 1),
        "share_of": {name: median_share(rates, rate[at::ways]) for name, rate in bare.items()},
    }


def median_share(rates: Sequence[float], of: Sequence[float]) -> float:
    shares = (rate / bare for rate, bare in zip(rates, of, strict=True))
    return round(statistics.median(shares), 3)


def where_time_goes(call: Callable[[], Any]) -> dict[str, Any]:
    """Shares of the wall clock by kind of operator, and the operators that took most."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        seconds = timed(call)
    spent: Counter[str] = Counter()
    for event in profiled.key_averages():  # an operator and a range can have the same name
        spent[event.key] += event.self_cpu_time_total / 1e6
    kinds: Counter[str] = Counter()
    for name, taken in spent.items():
        kinds[kind_of(name)] += taken / seconds
    kinds["outside of operators"] = 1 - sum(kinds.values())
    most = sorted(spent, key=lambda name: -spent[name])[:15]
    return {
        "shares": {kind: round(share, 3) for kind, share in kinds.most_common()},
        "operators": {name: [kind_of(name), round(spent[name] / seconds, 3)] for name in most},
    }


def kind_of(operator: str) -> str:
    return next((kind for kind, names in KINDS.items() if re.search(names, operator)), "other")


def as_markdown(runs: Sequence[dict[str, Any]]) -> str:
    products = list(runs[0]["products_gflops"])
    shares = [f"share of {name}" for name in products]
    head = ["dtype", "way", "GFLOP/s", *shares, "with attention", *shares]
    rates = [
        [
            *(run["dtype"], way["way"]),
            *(way["gflops"], *way["share_of"].values()),
            *(way["with_attention"]["gflops"], *way["with_attention"]["share_of"].values()),
        ]
        for run in runs
        for way in run["ways"]
    ]
    bare = [
        [run["dtype"], f"products by {name}", rate, *[""] * (1 + 2 * len(products))]
        for run in runs
        for name, rate in run["products_gflops"].items()
    ]
    kinds = [*KINDS, "other", "outside of operators"]
    spent = [
        [run["dtype"], way, *(f"{profile['shares'].get(kind, 0):.1%}" for kind in kinds)]
        for run in runs
        for way, profile in run["profiles"].items()
    ]
    return f"{as_table(head, rates + bare)}\n\n{as_table(['dtype', 'way', *kinds], spent)}"


if __name__ == "__main__":
    main()
