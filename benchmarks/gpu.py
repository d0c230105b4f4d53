"""RayReward on one GPU against transformers in a loop: speed, memory, share of what the GPU can do.

    PYTHONPATH=. python benchmarks/gpu.py [--budget-s 440] [--models 0.6B 1B 8B] [--result FILE]
    PYTHONPATH=. python benchmarks/gpu.py --smoke       # all of it on a CPU, with a tiny model

In one process, without Ray and without a hub: it needs this repository, torch, transformers and
pyarrow, and a GPU with 60 GB. What no longer fits into the budget, or fails, is left out and named
in the result, which is written again after each workload.

**Models**: Llama's 1B and 8B shapes, one of 0.6B (Qwen3's, with heads of 64) and, if asked for,
SmolLM2's of 135M, in bfloat16 with random weights, made on the device, since writing and reading
16 GB would take longer than measuring. The vocabulary is cut to 32,000 to save memory: embeddings
are looked up, not multiplied, and a reward model has no output layer.

**Workloads**, in token ids drawn from a fixed seed:

- pairs with about the lengths of hh-harmless-test in SmolLM2's tokens: prefixes log-normal with
  median 105 and sigma 0.65, between 12 and 420; branches log-normal with median 38 and sigma 0.75,
  between 8 and 300; texts between 60 and 500. What came out is in the result;
- completions: 8 of 64 tokens to each prompt of 512;
- singles: texts of 1,024.

**Ways**: RayReward in a flat stream with prefixes shared and not, in batches of several token
budgets, with layers compiled and not, by each kernel for attention that there is; padded;
transformers' own forward in a loop sorted by length, in batches of several sizes; the same in file
order, as its pipeline goes. What RayReward takes by itself is in the result, and so is G3's verdict
for each form; a form that it would not take is measured nevertheless. A way with the same batches
as an earlier one is left out. The first pass of each way warms up; then the ways take turns, and
medians count.

**Formulas**: model FLOPs = 2 · parameters of the body's linear layers · tokens that run through
them, padding and filling included. With attention, 4 · layers · heads · head size · (query, key)
pairs is added, counting for each token that runs the keys that it sees, itself included. MFU is
FLOPs over time, over the rate of an 8192 · 8192 · 8192 product in bfloat16, measured between the
passes.

**Rewards** are compared with those of the same weights in float32, one text at a time, over the
first 8,192 tokens of a workload: root mean square, in standard deviations of those rewards.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    RESULTS,
    ROOT,
    as_table,
    linear_parameters,
    versions,
    write,
)
from gpu_measuring import START_S, Clock, Measured, about_device, kernels_of, measure
from gpu_ways import SORTED, Form, Rewards, Way, forms_of, forward, make_ways
from gpu_workloads import (
    FULL,
    PAD_ID,
    SEED,
    SMALL,
    SMOKE,
    VOCABULARY,
    Scale,
    Texts,
    describe,
    draw_completions,
    draw_pairs,
    draw_singles,
    workloads,
)
from transformers import AutoModelForSequenceClassification, LlamaConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from rayreward.batching import share_prefixes
from rayreward.budget import find_budget
from rayreward.checkpoint import open_checkpoint
from rayreward.config import ModelConfig
from rayreward.invariance import find_dependence
from rayreward.loading import load_model
from rayreward.model import Loaded, RewardModel
from rayreward.types import Branch

BF16_TOLERANCE = 1.5
"""Times as far from float32 as the plain loop's rewards those of another way may be in bfloat16:
above what another order of summation does, far below what attending to the wrong tokens does."""
COMPARED_TOKENS = 8_192
FP32_TOLERANCE = 1e-5


def llama(**arguments: int) -> LlamaConfig:
    return LlamaConfig(
        **arguments,
        vocab_size=VOCABULARY,
        max_position_embeddings=8_192,
        pad_token_id=PAD_ID,
        num_labels=1,
    )


def build(
    config: LlamaConfig, scale: Scale
) -> tuple[RewardModel, PreTrainedModel, dict[str, Rewards]]:
    """A model with random weights, transformers' own with the same body, and exact rewards.

    As after `load_model`: the head in float32, nothing trained, attention by SDPA. transformers'
    own has its head in bfloat16, as loading a checkpoint in bfloat16 would give it.
    """
    torch.manual_seed(SEED)
    with scale.device:
        module = AutoModelForSequenceClassification.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    module.eval().requires_grad_(False)
    wide = copy.deepcopy(module).float()
    exact = {name: exact_rewards(wide, texts) for name, texts in workloads(scale).items()}
    del wide
    plain = copy.copy(module)
    plain._modules = {**module._modules, "score": copy.deepcopy(module.score)}
    module.score.float()
    loaded = Loaded("seeded", "bfloat16", config.max_position_embeddings, "sdpa")
    return RewardModel(module, PAD_ID, loaded, fuse=scale.device.type == "cuda"), plain, exact


def try_forms(
    model: RewardModel, name: str, scale: Scale, clock: Clock
) -> tuple[Form, dict[str, str]]:
    """The form that is taken, and for each form whether it keeps a reward's bits (G3)."""
    taken = Form(model.layout, model._kernel if model.layout == "flat" else None, model.fused)
    verdicts: dict[str, str] = {}
    for form in dict.fromkeys((taken, *forms_of(model))):
        with clock.bearing_failure(f"{name}: G3 {form}"):
            form.take(model)
            verdicts[str(form)] = verdict_on(model, scale.middle[0])
    taken.take(model)
    return taken, verdicts


def verdict_on(model: RewardModel, max_batch_tokens: int) -> str:
    start = time.perf_counter()
    moved_by = find_dependence(model, max_batch_tokens)
    verdict = f"moved {' and '.join(moved_by)}" if moved_by else "holds"
    return f"{verdict}, tried for {time.perf_counter() - start:.1f} s"


def exact_rewards(wide: PreTrainedModel, texts: Texts) -> Rewards:
    """Of a workload's first texts, by transformers one at a time, in float32."""
    ends = np.cumsum([len(text) for text in texts])
    chosen = texts[: int((ends <= COMPARED_TOKENS).sum())]
    return [forward(wide, [Branch(text)]).item() for text in chosen]


def compare_in_float32(device: torch.device) -> dict[str, Any]:
    """A small model, saved and loaded as any checkpoint is, against transformers one at a time."""
    texts = [*draw_pairs(8), *draw_completions(1), *draw_singles(2)]
    apart, shared = [Branch(text) for text in texts], share_prefixes(texts)
    with tempfile.TemporaryDirectory() as path:
        torch.manual_seed(SEED)
        AutoModelForSequenceClassification.from_config(llama(**SMALL)).save_pretrained(path)
        plain = AutoModelForSequenceClassification.from_pretrained(path).eval().to(device)
        config = ModelConfig(model=path, dtype="float32")
        model, on_cpu = (
            load_model(open_checkpoint(path), config, PAD_ID, str(where))
            for where in (device, "cpu")
        )
    expected = torch.cat([forward(plain, [branch]) for branch in apart])
    layout, verdict = model.layout, verdict_on(model, 16_384)
    Form("flat", "blocks").take(model)
    here, unshared, there = (
        torch.tensor(scored.tolist())
        for scored in (model.rewards(shared), model.rewards(apart), on_cpu.rewards(shared))
    )
    error, cpu_error = ((rewards - expected).abs().max() for rewards in (here, there))
    return {
        "layout": layout,
        "g3": verdict,
        "flat_from_transformers": float(error),
        "flat_on_cpu_from_transformers_here": float(cpu_error),
        "tolerance": FP32_TOLERANCE,
        "within_tolerance": bool(max(error, cpu_error) <= FP32_TOLERANCE),
        "same_bits_unshared": torch.equal(here, unshared),
    }


def runs_of(
    ways: Sequence[Way], measured: Measured, config: LlamaConfig, given: int, exact: Rewards
) -> Iterator[dict[str, Any]]:
    """What is told of each way.

    Args:
        ways: The ways.
        measured: What passes of them gave.
        config: Of the model.
        given: Tokens of all texts.
        exact: Rewards of the first texts in float32.
    """
    medians = {name: statistics.median(taken) for name, taken in measured.seconds.items()}
    loops = [name for name in medians if SORTED in name]
    best = measured.seconds[min(loops, key=medians.__getitem__)] if loops else []
    off = {name: off_by(rewards, exact) for name, rewards in measured.rewards.items()}
    allowed = BF16_TOLERANCE * max((off[name] for name in loops), default=np.inf)
    linear, tail = 2 * linear_parameters(config), 2 * tail_parameters(config)
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    for way in ways:
        if way.name not in medians:
            continue
        median, memory = medians[way.name], measured.memory[way.name]
        possible = median * measured.product_rate
        flops = linear * way.tokens - tail * way.ended
        ratios = [b / own for b, own in zip(best, measured.seconds[way.name], strict=False)]
        yield {
            "way": way.name,
            "batches": len(way.batches),
            "median_s": round(median, 4),
            "seconds": [round(taken, 4) for taken in measured.seconds[way.name]],
            "rows_per_s": round(len(measured.rewards[way.name]) / median, 1),
            "input_tokens_per_s": round(given / median),
            "tokens_run": way.tokens,
            "tokens_run_per_s": round(way.tokens / median),
            "times_best_loop": round(statistics.median(ratios), 2) if ratios else None,
            "mfu": round(flops / possible, 3),
            "mfu_with_attention": round((flops + attention * way.seen) / possible, 3),
            "peak_memory_gb": round(memory / 1e9, 2),
            "off_float32": float(f"{off[way.name]:.2g}"),
            "within_tolerance": bool(off[way.name] <= allowed),
        }


def off_by(rewards: Rewards, exact: Rewards) -> float:
    """How far the first rewards are from the exact ones: root mean square, in deviations."""
    apart = np.array(rewards[: len(exact)]) - exact
    return float(np.sqrt((apart**2).mean()) / np.std(exact))


def tail_parameters(config: LlamaConfig) -> int:
    """Of what follows a layer's attention: its output's projection, and the MLP."""
    attended = config.num_attention_heads * config.head_dim
    return config.hidden_size * (attended + 3 * config.intermediate_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget-s", type=float, default=440.0)
    parser.add_argument("--smoke", action="store_true", help="on a CPU, with a tiny model")
    parser.add_argument("--models", nargs="+", choices=FULL.shapes, default=["0.6B", "1B", "8B"])
    parser.add_argument("--result", type=Path, help="default: benchmarks/results/gpu-<name>.json")
    arguments = parser.parse_args()
    if not arguments.smoke and not torch.cuda.is_available():
        sys.exit("There is no CUDA GPU here. --smoke runs all of this on a CPU, with a tiny model.")
    scale = SMOKE if arguments.smoke else FULL
    clock = Clock(arguments.budget_s)
    disable_progress_bar()
    result = {
        "hardware": about_device(scale.device),
        "versions": versions("numpy"),
        "dtype": "bfloat16",
        "times_off_float32_allowed": BF16_TOLERANCE,
        "budget_s": arguments.budget_s,
        "workloads": {name: describe(texts) for name, texts in workloads(scale).items()},
        "float32": {},
        "models": {},
        "runs": [],
        "kernels": {},
        "left_out": clock.left_out,
    }
    if clock.has(START_S, "float32"):
        with clock.bearing_failure("float32"):
            result["float32"] = compare_in_float32(scale.device)
    slug = "-".join((result["hardware"]["gpu"] or "smoke").lower().split())
    folder = ROOT / "build" if arguments.smoke else RESULTS
    path = arguments.result or folder / f"gpu-{slug}.json"
    for name in scale.shapes if arguments.smoke else arguments.models:
        if clock.has(2 * START_S, name):
            with clock.bearing_failure(name):
                for _ in run_model(name, scale, clock, result):
                    write(path, result)
            gc.collect()  # before the next model takes the memory
    write(path, {**result, "elapsed_s": round(clock.elapsed_s)})
    print(as_markdown(result["runs"]))
    print(*clock.left_out, sep="\n")


def run_model(name: str, scale: Scale, clock: Clock, result: dict[str, Any]) -> Iterator[str]:
    """Measures one model and adds to the result; yields each workload's name when it is done."""
    config = llama(**scale.shapes[name])
    start = time.perf_counter()
    model, plain, exact = build(config, scale)
    taken, verdicts = try_forms(model, name, scale, clock)
    result["models"][name] = {
        "config": {key: getattr(config, key) for key in (*SMALL, "vocab_size")},
        "linear_parameters": linear_parameters(config),
        "ready_in_s": round(time.perf_counter() - start, 1),
        "taken": str(taken),
        "narrowed": model._last_attention is not None,
        "budget_by_itself": find_budget(model),
        "g3": verdicts,
    }
    for workload, texts in workloads(scale).items():
        what = f"{name} {workload}"
        print(what, flush=True)
        ways = make_ways(model, plain, texts, scale, taken)
        measured = measure(ways, scale, clock, what)
        about = {
            "model": name,
            "workload": workload,
            "repeats": measured.repeats,
            "product_tflops": round(measured.product_rate / 1e12, 4),
        }
        given = describe(texts)["tokens"]
        told = runs_of(ways, measured, config, given, exact[workload])
        result["runs"] += [about | run for run in told]
        yield workload
    for way in make_ways(model, plain, workloads(scale)["pairs"], scale, taken):
        if f"{scale.middle[0]:,}" in way.name and clock.has(START_S, f"profile of {way.name}"):
            with clock.bearing_failure(f"profile of {way.name}"):
                result["kernels"][f"{name}, {way.name}"] = kernels_of(way)


def as_markdown(runs: Sequence[dict[str, Any]]) -> str:
    columns = {
        "model": "model",
        "workload": "workload",
        "way": "way",
        "s": "median_s",
        "rows/s": "rows_per_s",
        "input tokens/s": "input_tokens_per_s",
        "× the best loop": "times_best_loop",
        "MFU": "mfu",
        "with attention": "mfu_with_attention",
        "GB": "peak_memory_gb",
        "off float32 (σ)": "off_float32",
    }
    return as_table(list(columns), ([run[key] for key in columns.values()] for run in runs))


if __name__ == "__main__":
    main()
