"""Measures which change around a text moves the bits of its reward, how often and how far.

    python benchmarks/determinism.py [--every 6] [--result FILE]

Two ways of scoring, side by side: a plain transformers loop as anybody would write it, and
RayReward. Each text of some example pairs is scored alone, with two threads. Then one thing is done
otherwise (the batch, its order, the padding, the threads, the processor's instructions …) and the
rewards are compared bit by bit, in float32 and in bfloat16. `changes.py` lists what is
tried; a GPU, where there is one, is one more change.

Model: SmolLM2-135M-Instruct with a head drawn from seed 42, saved once, so that every run reads the
same weights. A small random Bloom stands for architectures that RayReward runs in padded
batches, since they can't run as a flat stream.

Prints Markdown and writes the same figures, with hardware and versions, as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import chdir
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import transformers
from changes import BLOOM, CASES, CHANGES, COLUMNS, DTYPES, NOTHING, SMOLLM, Case, Change, Setting
from hh import cpu_name
from numpy.typing import NDArray
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BloomConfig,
    BloomForSequenceClassification,
    set_seed,
)

from rayreward import ModelConfig, Scorer
from rayreward.types import Reward, Text

ROOT = Path(__file__).parents[1]
PAIRS = ROOT / "examples" / "formats" / "pairs_text.parquet"
SEED = 42

Floats = NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=6, help="take one example pair of so many")
    parser.add_argument(
        "--result", type=Path, default=ROOT / "benchmarks" / "results" / "determinism.json"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments.worker:
        work(json.loads(arguments.worker))
        return
    with tempfile.TemporaryDirectory() as scratch, chdir(scratch):
        prepare(arguments.every)
        result = measure()
    arguments.result.parent.mkdir(exist_ok=True)
    arguments.result.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))


# ---- what all processes read: texts and models, in the working directory


def prepare(every: int) -> None:
    pairs = pq.read_table(PAIRS).to_pylist()[every // 2 :: every]
    texts = [(pair["prompt"], pair[side]) for pair in pairs for side in ("chosen", "rejected")]
    Path("texts.json").write_text(json.dumps(texts))
    script = [sys.executable, ROOT / "examples" / "smollm2.py"]
    headless = subprocess.check_output(script, text=True).strip()
    Path("headless").symlink_to(headless)
    tokenizer = AutoTokenizer.from_pretrained(headless)
    for name, model in ((SMOLLM, draw_head()), (BLOOM, make_bloom(tokenizer))):
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)


def draw_head() -> Any:
    """Loads the checkpoint without a head as anybody would, and transformers draws one."""
    set_seed(SEED)
    return AutoModelForSequenceClassification.from_pretrained(
        "headless", num_labels=1, dtype=torch.float32
    )


def make_bloom(tokenizer: Any) -> Any:
    set_seed(SEED)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 256, "n_layer": 6, "n_head": 8}
    config = BloomConfig(**sizes, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    return BloomForSequenceClassification(config)


# ---- a worker: all cases of one environment


def work(environment: Mapping[str, str] | None) -> None:
    texts = [Text(prompt, completion) for prompt, completion in json.loads(read("texts.json"))]
    answer: dict[str, Any] = {"rewards": {}, "heads": draw_heads()}
    for case in CASES:
        if case.change.environment == environment:
            start = time.monotonic()
            answer["rewards"][case.key] = score(case.setting, texts).tolist()
            print(f"{time.monotonic() - start:6.1f} s  {case.key}", file=sys.stderr, flush=True)
    if environment is None:
        answer["facts"] = find_facts(texts)
    Path("answer.json").write_text(json.dumps(answer))


def draw_heads() -> dict[str, list[float]]:
    """The head of seed 42 as drawn in this process, by way of drawing it."""
    config = ModelConfig(model="headless", seed=SEED, dtype="float32", batch_invariant=False)
    (ours,) = Scorer.load(config, "cpu").head_state().values()
    return {"transformers": draw_head().score.weight[0].tolist(), "RayReward": ours[0].tolist()}


def score(setting: Setting, texts: Sequence[Text]) -> Floats:
    """Scores the texts in the setting's order and batches; returns rewards in the texts' order."""
    torch.set_num_threads(setting.threads)
    score_units = {"transformers": score_plain, "rayreward": score_ours}[setting.way]
    rewards = np.full(len(texts), np.nan, np.float32)
    units = ordered_units(setting, texts)
    size = setting.batch or len(units)
    for start in range(0, len(units), size):
        batch = units[start : start + size]
        values = score_units(setting, [[texts[at] for at in unit] for unit in batch])
        rewards[[at for unit in batch for at in unit]] = values
    return rewards


def ordered_units(setting: Setting, texts: Sequence[Text]) -> list[list[int]]:
    """What is handed over together, as places in `texts`: one text, or the sides of a pair."""
    if setting.pairs:
        return [[at, at + 1] for at in range(0, len(texts), 2)]
    order = list(range(len(texts)))
    if setting.order == "length":
        order.sort(key=lambda at: len(texts[at].prompt + texts[at].completion))
    if setting.order == "shuffled":
        random.Random(SEED).shuffle(order)
    return [[at] for at in order]


@torch.inference_mode()
def score_plain(setting: Setting, units: Sequence[Sequence[Text]]) -> list[float]:
    tokenizer, model = load_plain(setting.model, setting.dtype, setting.attention, setting.device)
    texts = [text.prompt + text.completion + tokenizer.eos_token for unit in units for text in unit]
    inputs = tokenizer(texts, padding=True, padding_side=setting.padding, return_tensors="pt")
    return model(**inputs.to(setting.device)).logits[:, 0].float().tolist()


def score_ours(setting: Setting, units: Sequence[Sequence[Text]]) -> list[float]:
    outcomes = [one for group in scorer(setting).score_groups(units) for one in group]
    return [outcome.value for outcome in outcomes if isinstance(outcome, Reward)]


def scorer(setting: Setting) -> Scorer:
    config = ModelConfig(
        model=setting.model,
        dtype=setting.dtype,
        max_batch_tokens=setting.budget,
        share_prefixes=setting.share,
        batch_invariant=setting.invariant,
    )
    return load_ours(config, setting.device)


@lru_cache(maxsize=2)
def load_plain(name: str, dtype: str, attention: str, device: str) -> tuple[Any, Any]:
    model = AutoModelForSequenceClassification.from_pretrained(
        name, num_labels=1, dtype=getattr(torch, dtype), attn_implementation=attention
    )
    return AutoTokenizer.from_pretrained(name), model.to(device).eval()


@lru_cache(maxsize=2)
def load_ours(config: ModelConfig, device: str) -> Scorer:
    return Scorer.load(config, device)


def find_facts(texts: Sequence[Text]) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM)
    lengths = [len(tokenizer(t.prompt + t.completion).input_ids) + 1 for t in texts]
    layouts = [
        {**case.columns, "layout": scorer(case.setting)._model.layout}
        for case in CASES
        if case.change is NOTHING and case.setting.way == "rayreward"
    ]
    return {
        "workload": f"{len(texts)} texts of the example pairs, {min(lengths)} to {max(lengths)} "
        f"tokens, {sum(lengths):,} in all; head from seed {SEED}",
        "layouts": layouts,
        "hardware": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


# ---- the driver: a worker for each environment, then the comparison


def measure() -> dict[str, Any]:
    """Scores all cases and compares them; returns what goes into the result file."""
    environments = {describe(case.change): case.change.environment for case in CASES}
    answers = {name: ask_worker(variables) for name, variables in environments.items()}
    rewards = {key: v for answer in answers.values() for key, v in answer["rewards"].items()}
    first = answers[describe(NOTHING)]
    return {
        **first["facts"],
        "rows": [
            {
                **case.columns,
                "change": case.change.label,
                **compare(rewards[case.key], rewards[replace(case, change=NOTHING).key]),
            }
            for case in CASES
            if case.change is not NOTHING
        ],
        "between_ways": [
            {"model": model, "dtype": dtype, **compare_ways(rewards, model, dtype)}
            for model in COLUMNS
            for dtype in DTYPES
        ],
        "heads": [
            {"drawn_in": name, "column": way, **compare(head, first["heads"]["transformers"])}
            for name, answer in answers.items()
            for way, head in answer["heads"].items()
        ],
    }


def describe(change: Change) -> str:
    variables = change.environment
    if variables is None:
        return "the process of the texts alone"
    return ", ".join(f"`{k}={v}`" for k, v in variables.items()) or "another process"


def ask_worker(environment: Mapping[str, str] | None) -> dict[str, Any]:
    command = [sys.executable, Path(__file__).resolve(), "--worker", json.dumps(environment)]
    subprocess.run(command, env={**os.environ, **(environment or {})}, check=True)
    answer: dict[str, Any] = json.loads(read("answer.json"))
    return answer


def read(path: str) -> str:
    return Path(path).read_text()


def compare(values: Sequence[float], expected: Sequence[float]) -> dict[str, Any]:
    a, b = np.array(values, np.float32), np.array(expected, np.float32)
    return {
        "values": len(a),
        "same_bits": int((a.view(np.uint32) == b.view(np.uint32)).sum()),
        "largest_difference": float(np.abs(a - b).max()),
    }


def compare_ways(rewards: Mapping[str, Sequence[float]], model: str, dtype: str) -> dict[str, Any]:
    """RayReward's rewards of each text alone against transformers'."""
    plain = rewards[Case(model, dtype, "transformers", NOTHING).key]
    ours = rewards[Case(model, dtype, "RayReward", NOTHING).key]
    return {**compare(ours, plain), "span": max(plain) - min(plain)}


# ---- Markdown


def markdown(result: Mapping[str, Any]) -> str:
    """The result as tables. A cell: how many values have the same bits; the largest difference."""
    hardware = result["hardware"]
    machine = f"{hardware['cores']} cores of an {hardware['cpu']} ({hardware['capability']})"
    machine += f", {hardware['gpu']}" if hardware["gpu"] else ""
    programs = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return "\n\n".join(
        [
            f"{result['workload']}. {machine}; {programs}.",
            *(changes_table(result, model) for model in COLUMNS),
            between_table(result["between_ways"]),
            heads_table(result["heads"]),
        ]
    )


def changes_table(result: Mapping[str, Any], model: str) -> str:
    columns = [(column, dtype) for column in COLUMNS[model] for dtype in DTYPES]
    found = [row for row in [*result["layouts"], *result["rows"]] if row["model"] == model]
    cells = {(row.get("change"), row["column"], row["dtype"]): row for row in found}
    labels = [change.label for change in CHANGES[model] if change is not NOTHING]
    layouts = [cells.get((None, *column), {}).get("layout", "") for column in columns]
    return table(
        [model, *(f"{column}, {dtype}" for column, dtype in columns)],
        [
            ["layout", *layouts],
            *([label, *(cell(cells.get((label, *c))) for c in columns)] for label in labels),
        ],
    )


def between_table(pairs: Sequence[Mapping[str, Any]]) -> str:
    header = ["RayReward against transformers, each text alone", "rewards", "these span"]
    return table(
        header, [[f"{p['model']}, {p['dtype']}", cell(p), f"{p['span']:.2f}"] for p in pairs]
    )


def heads_table(heads: Sequence[Mapping[str, Any]]) -> str:
    cells = {(head["drawn_in"], head["column"]): head for head in heads}
    ways = list(dict.fromkeys(head["column"] for head in heads))
    return table(
        [f"head drawn from seed {SEED} in", *ways],
        [
            [name, *(cell(cells[name, way]) for way in ways)]
            for name in dict.fromkeys(head["drawn_in"] for head in heads)
        ],
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    share = f"{100 * row['same_bits'] / row['values']:.0f} %"
    if row["same_bits"] == row["values"]:
        return share
    return f"{share}; {row['largest_difference']:.1e}".replace("e-0", "e-")


if __name__ == "__main__":
    main()
