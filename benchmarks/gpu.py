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
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    RESULTS,
    ROOT,
    as_table,
    hardware,
    linear_parameters,
    stream_tokens,
    versions,
    write,
)
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForSequenceClassification, LlamaConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from rayreward.attention import Kernel
from rayreward.batching import make_batches, pack_branches, share_prefixes
from rayreward.budget import find_budget
from rayreward.checkpoint import open_checkpoint
from rayreward.config import ModelConfig
from rayreward.fusing import Fused, fuse_layers, gains_together, unfuse_layers
from rayreward.invariance import find_dependence
from rayreward.loading import load_model
from rayreward.model import Layout, Loaded, RewardModel
from rayreward.sizes import Sizes
from rayreward.types import Branch

SEED = 42
PAD_ID = 0
VOCABULARY = 32_000
BF16_TOLERANCE = 1.5
"""Times as far from float32 as the plain loop's rewards those of another way may be in bfloat16:
above what another order of summation does, far below what attending to the wrong tokens does."""
COMPARED_TOKENS = 8_192
FP32_TOLERANCE = 1e-5
SORTED = "sorted by length"
START_S = 20.0
"""Seconds that must be left for something to be begun that has not been timed yet."""

Rewards = list[float]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is measured."""

    device: torch.device
    shapes: dict[str, dict[str, int]]
    pairs: int
    prompts: int
    singles: int
    budgets: tuple[int, ...]
    """RayReward's tokens in a batch."""
    sizes: tuple[int, ...]
    """Texts in a batch of the loop."""
    repeats: int
    product: int
    """Rows and columns of the matrices by which the hardware is measured."""

    @property
    def middle(self) -> tuple[int, int]:
        """The budget and the batch size where only one is measured."""
        return self.budgets[len(self.budgets) // 2], self.sizes[len(self.sizes) // 2]


def shape(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
    }


FULL = Scale(
    device=torch.device("cuda:0"),
    shapes={
        "135M": shape(576, 30, 9, 3, 1_536),
        "0.6B": shape(1_024, 28, 16, 8, 3_072),
        "1B": shape(2_048, 16, 32, 8, 8_192),
        "8B": shape(4_096, 32, 32, 8, 14_336),
    },
    pairs=128,
    prompts=16,
    singles=32,
    budgets=(8_192, 16_384, 32_768),
    sizes=(8, 32, 64),
    repeats=3,
    product=8_192,
)
SMOKE = Scale(
    device=torch.device("cpu"),
    shapes={"tiny": shape(64, 2, 4, 2, 128)},
    pairs=4,
    prompts=1,
    singles=2,
    budgets=(512, 1_024, 2_048),
    sizes=(2, 4, 8),
    repeats=1,
    product=128,
)
SMALL = shape(256, 4, 8, 2, 512)
"""For what is compared in float32."""


class Clock:
    """The time there is, and what was left out for want of it or because it failed."""

    def __init__(self, budget_s: float) -> None:
        self._start = time.monotonic()
        self._end = self._start + budget_s
        self.left_out: list[str] = []

    def has(self, seconds: float, what: str) -> bool:
        left = self._end - time.monotonic()
        if left < seconds:
            self.left_out.append(f"{what}: {left:.0f} s were left")
        return left >= seconds

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._start

    @contextmanager
    def bearing_failure(self, what: str) -> Iterator[None]:
        """What one way can't do (running out of memory, say) doesn't take the others along."""
        try:
            yield
        except Exception as error:
            self.left_out.append(f"{what}: {repr(error).splitlines()[0][:300]}")


# workloads


Texts = list[tuple[int, ...]]


def draw_pairs(count: int) -> Texts:
    dice = np.random.default_rng(SEED)
    prefixes = dice.lognormal(np.log(105), 0.65, count)
    branches = np.clip(dice.lognormal(np.log(38), 0.75, (count, 2)), 8, 300).astype(int)
    least, most = 60 - branches.min(axis=1), 500 - branches.max(axis=1)
    prefixes = np.clip(prefixes, np.maximum(12, least), np.minimum(420, most)).astype(int)
    return [text for p, b in zip(prefixes, branches, strict=True) for text in draw(dice, p, b)]


def draw_completions(prompts: int) -> Texts:
    dice = np.random.default_rng(SEED)
    return [text for _ in range(prompts) for text in draw(dice, 512, [64] * 8)]


def draw_singles(count: int) -> Texts:
    dice = np.random.default_rng(SEED)
    return [text for _ in range(count) for text in draw(dice, 0, [1_024])]


def draw(dice: np.random.Generator, prefix: int, branches: Sequence[int]) -> Texts:
    """Texts that begin alike."""
    first, *others = (tuple(dice.integers(3, VOCABULARY, n).tolist()) for n in (prefix, *branches))
    return [first + other for other in others]


def workloads(scale: Scale) -> dict[str, Texts]:
    return {
        "pairs": draw_pairs(scale.pairs),
        "completions": draw_completions(scale.prompts),
        "singles": draw_singles(scale.singles),
    }


def describe(texts: Texts) -> dict[str, Any]:
    lengths = [len(text) for text in texts]
    spared = sum(branch.shared for branch in share_prefixes(sorted(texts)))
    return {
        "texts": len(lengths),
        "tokens": sum(lengths),
        "shortest": min(lengths),
        "mean": round(statistics.mean(lengths)),
        "longest": max(lengths),
        "shareable": round(spared / sum(lengths), 3),
    }


# ways of scoring


@dataclass(frozen=True, slots=True)
class Batch:
    branches: list[Branch]
    texts: list[int]
    """Which texts of the workload these are, in order."""


@dataclass(frozen=True, slots=True)
class Form:
    """A way for RayReward to run a batch."""

    layout: Layout
    kernel: Kernel | None = None
    """What computes attention in a flat stream."""
    compiled: Fused | None = None

    def __str__(self) -> str:
        parts = [self.layout, *([f"by {self.kernel}"] if self.kernel else [])]
        return " ".join([*parts, *([f"compiled {self.compiled}"] if self.compiled else [])])

    def take(self, model: RewardModel) -> None:
        """Makes the model run so, whether it would by itself or not."""
        model.layout = self.layout
        if self.kernel is not None:
            model._kernel, model._causal = self.kernel, True
        unfuse_layers(model._module)
        if self.compiled:
            fuse_layers(model._module, together=self.compiled == "together")


def forms_of(model: RewardModel) -> list[Form]:
    """All forms that are measured, the padded one last."""
    others = [Form("flat", "blocks"), Form("padded")]
    if model.device.type == "cpu":
        return others
    compiled = [Form("flat", "varlen", "one by one"), Form("flat", "varlen")]
    if gains_together(model._module):
        compiled.insert(0, Form("flat", "varlen", "together"))
    return compiled + others


@dataclass(frozen=True, slots=True)
class Way:
    name: str
    batches: list[Batch]
    prepare: Callable[[], None]
    """What comes before a pass."""
    score: Callable[[list[Branch]], torch.Tensor]
    form: Form | None = None
    """None: transformers' own."""
    sizes: Sizes | None = None
    """What a flat stream's tokens are filled up to. None: batches are padded."""
    narrowed: bool = False
    """Whether only pooled tokens go on after the last attention."""

    def run(self) -> Rewards:
        """Scores the workload; its rewards in the order of its texts.

        As in `Scorer`, a batch is begun before the one before it is read.
        """
        found: dict[int, float] = {}
        begun: tuple[Batch, torch.Tensor] | None = None
        for batch in [*self.batches, None]:
            now = None if batch is None else (batch, self.score(batch.branches))
            if begun is not None:
                found.update(zip(begun[0].texts, begun[1].tolist(), strict=True))
            begun = now
        return [found[text] for text in sorted(found)]

    @property
    def tokens(self) -> int:
        """Tokens that run."""
        if self.sizes is None:
            return sum(rows * longest for rows, longest in self._padded())
        return sum(stream_tokens(batch.branches, self.sizes) for batch in self.batches)

    @property
    def ended(self) -> int:
        """Tokens that run no further than the last attention."""
        if self.sizes is None or not self.narrowed:
            return 0
        return self.tokens - sum(self.sizes.filled(len(batch.texts)) for batch in self.batches)

    @property
    def seen(self) -> int:
        """(query, key) pairs of tokens that run; a token sees itself and those before it."""
        if self.sizes is None:
            return sum(rows * triangle(longest) for rows, longest in self._padded())
        branches = (branch for batch in self.batches for branch in batch.branches)
        return sum(triangle(len(branch.ids)) - triangle(branch.shared) for branch in branches)

    def _padded(self) -> Iterator[tuple[int, int]]:
        for batch in self.batches:
            lengths = [len(branch.ids) for branch in batch.branches]
            yield len(lengths), max(lengths)


def triangle(side: int) -> int:
    return side * (side + 1) // 2


def make_ways(
    model: RewardModel, plain: PreTrainedModel, texts: Texts, scale: Scale, taken: Form
) -> list[Way]:
    """Every way to score a workload; of the flat forms, the one that is taken in all its sizes."""
    lengths = [len(text) for text in texts]
    budget, size = scale.middle
    *streams, padded = forms_of(model)
    first, *others = sorted(streams, key=lambda form: form != taken)

    def ours(form: Form, how: str, batches: list[Batch], budget: int) -> Way:
        name = f"RayReward {form}, {how}, {budget:,} tokens"
        sizes = None if form.layout == "padded" else model.sizes
        narrowed = model._last_attention is not None
        return Way(name, batches, lambda: form.take(model), model.rewards, form, sizes, narrowed)

    def pack(some: int, *, share: bool) -> list[Batch]:
        """Batches as `Scorer` makes them for a flat stream."""
        if not share:
            return number(pack_branches([Branch(text) for text in texts], some), range(len(texts)))
        order = sorted(range(len(texts)), key=texts.__getitem__)
        branches = share_prefixes([texts[index] for index in order], model.worth_sharing)
        return number(pack_branches(branches, some), order)

    def loop(name: str, order: Sequence[int], size: int) -> Way:
        batches = [list(order[start : start + size]) for start in range(0, len(order), size)]
        name = f"transformers, {name}, batches of {size}"
        return Way(
            name,
            pick(texts, batches),
            lambda: unfuse_layers(plain),
            lambda batch: forward(plain, batch),
        )

    by_length = sorted(range(len(texts)), key=lengths.__getitem__)
    return without_repetitions(
        [
            *(ours(first, "shared", pack(some, share=True), some) for some in scale.budgets),
            *(ours(first, "unshared", pack(some, share=False), some) for some in scale.budgets),
            *(ours(form, "shared", pack(budget, share=True), budget) for form in others),
            ours(padded, "sorted", pick(texts, make_batches(lengths, budget)), budget),
            *(loop(SORTED, by_length, some) for some in scale.sizes),
            loop("file order", range(len(texts)), size),
        ]
    )


def without_repetitions(ways: Sequence[Way]) -> list[Way]:
    kept: list[Way] = []
    for way in ways:
        if not any((way.form, way.batches) == (other.form, other.batches) for other in kept):
            kept.append(way)
    return kept


def number(batches: Sequence[list[Branch]], order: Sequence[int]) -> list[Batch]:
    """Batches that hold a workload's texts in some order."""
    texts = iter(order)
    return [Batch(batch, list(islice(texts, len(batch)))) for batch in batches]


def pick(texts: Texts, batches: Sequence[list[int]]) -> list[Batch]:
    return [Batch([Branch(texts[index]) for index in chosen], chosen) for chosen in batches]


@torch.inference_mode()
def forward(plain: PreTrainedModel, batch: Sequence[Branch]) -> torch.Tensor:
    """The forward of transformers itself over a batch that is padded on the right; waits for it."""
    rows = [torch.tensor(branch.ids) for branch in batch]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD_ID)
    ids = ids.to(plain.device)
    mask = (ids != PAD_ID).long()
    return plain(input_ids=ids, attention_mask=mask).logits[:, 0].float().cpu()


# models


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


# measuring


@dataclass(frozen=True, slots=True)
class Measured:
    """What passes over a workload gave, by the name of the way."""

    seconds: dict[str, list[float]]
    memory: dict[str, int]
    rewards: dict[str, Rewards]
    repeats: int
    product_rate: float
    """FLOP/s."""


def measure(ways: Sequence[Way], scale: Scale, clock: Clock, what: str) -> Measured:
    """A pass of each way to warm up, then the ways in turns, as often as the time allows."""
    warm: dict[str, float] = {}
    memory: dict[str, int] = {}
    rewards: dict[str, Rewards] = {}
    for way in ways:
        if clock.has(START_S, f"{what}: {way.name}"):
            with clock.bearing_failure(f"{what}: {way.name}"):
                warm[way.name], rewards[way.name], memory[way.name] = timed(way)
    repeats: list[dict[str, float]] = []
    rates = [product_rate(scale)]
    for number in range(1, scale.repeats + 1):
        if not clock.has(sum(warm.values()), f"{what}: repeat {number} of {scale.repeats}"):
            break
        repeats.append({way.name: timed(way)[0] for way in ways if way.name in warm})
        rates.append(product_rate(scale))
    seconds = {name: [repeat[name] for repeat in repeats or [warm]] for name in warm}
    return Measured(seconds, memory, rewards, len(repeats), statistics.median(rates))


def timed(way: Way) -> tuple[float, Rewards, int]:
    """Seconds, rewards, and the most bytes that were allocated on the GPU."""
    way.prepare()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    rewards = way.run()  # ends with a copy to the host
    seconds = time.perf_counter() - start
    return seconds, rewards, torch.cuda.max_memory_allocated() if on_gpu else 0


def product_rate(scale: Scale, times: int = 20) -> float:
    """FLOP/s of a square matrix product in bfloat16."""
    size, device = scale.product, scale.device
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        left @ right
    synchronize()
    start = time.perf_counter()
    for _ in range(times):
        left @ right
    synchronize()
    return 2 * size**3 * times / (time.perf_counter() - start)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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


def kernels_of(way: Way) -> dict[str, Any]:
    """Where the time of a way's first batch goes, and how much of it the device was busy."""
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    way.prepare()
    way.run()
    with profile(activities=activities) as profiled:
        start = time.perf_counter()
        way.score(way.batches[0].branches).tolist()
        seconds = time.perf_counter() - start
    spent = {
        event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total
        for event in profiled.key_averages()
        if not on_gpu or event.device_type == DeviceType.CUDA
    }
    total = sum(spent.values()) or 1.0
    most = sorted(spent, key=lambda key: -spent[key])[:12]
    return {
        "busy": round(total / 1e6 / seconds, 3),
        "shares": {key[:120]: round(spent[key] / total, 3) for key in most},
    }


def about_device(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {**hardware(), "gpu": None}
    gpu = torch.cuda.get_device_properties(device)
    asked = ("driver_version", "clocks.max.sm", "power.limit", "mig.mode.current")
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(asked)}", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        **hardware(),
        "gpu": gpu.name,
        "memory_gb": round(gpu.total_memory / 1e9, 1),
        "multiprocessors": gpu.multi_processor_count,
        "capability": f"{gpu.major}.{gpu.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **dict(zip(asked, answer.split(", "), strict=False)),
    }


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
