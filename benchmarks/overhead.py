"""What the pool adds to a scorer: per row, before the first reward, and per shard.

    python benchmarks/overhead.py [--pairs 32] [--repeats 3] [--shards 50 250]

On a local Ray with two CPUs, one actor on both. SmolLM2-135M-Instruct with a head drawn from seed
42, pairs of hh-harmless-test where they lie beside the checkout, else the example pairs.

- **rows**: `RewardPool.score_table` against `Scorer.score_table` in a process of its own with the
  same threads, on the same rows in turns, so that only one of them works at a time; the rewards
  have to be the same bits;
- **start**: from the call of `RewardPool(…)`, Ray being up, to its first reward. It holds the
  actor's process and its imports, loading, trying G3, hashing and comparing;
- **shards**: jobs of many shards of one row on a tiny random model. Two numbers of shards, so that
  what a job costs once drops out: seconds and the driver's own CPU seconds for each further shard.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rayreward.threads import wait_briefly

wait_briefly()  # the scorer, too

import pyarrow as pa
import ray
from common import RESULTS, as_table, hardware, pairs, smollm2, versions, write
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from rayreward import ModelConfig, RewardPool, Scorer
from rayreward.allocator import FreedMemory
from rayreward.preferences import check_schema

CPUS = 2
SEED = 42
DTYPES: tuple[Any, ...] = ("float32", "bfloat16")
SENTENCE = "what is the best answer to any question about our weather"
WORDS = SENTENCE.split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=32, help="in a pass")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shards", type=int, nargs=2, default=[50, 250])
    parser.add_argument("--result", type=Path, default=RESULTS / "overhead.json")
    arguments = parser.parse_args()
    disable_progress_bar()
    model = smollm2()
    source, rows = pairs(arguments.pairs * (arguments.repeats + 1))
    passes = [
        pa.Table.from_pylist(rows[start : start + arguments.pairs])
        for start in range(0, len(rows), arguments.pairs)
    ]
    ray.init(address="local", num_cpus=CPUS, include_dashboard=False, configure_logging=False)
    try:
        starts = [measure_start(model, dtype, arguments.repeats) for dtype in DTYPES]
        rates = [measure_rows(model, dtype, passes) for dtype in DTYPES]
        shards = measure_shards(*arguments.shards)
    finally:
        ray.shutdown()
    result = {
        "hardware": hardware(),
        "versions": versions("ray"),
        "workload": f"{arguments.repeats} passes over {arguments.pairs} pairs each of {source}",
        "start": starts,
        "rows": rates,
        "shards": shards,
    }
    write(arguments.result, result)
    print(as_markdown(result))


def open_pool(model: str, dtype: Any = "auto") -> RewardPool:
    return RewardPool(model, seed=SEED, dtype=dtype, num_actors=1, num_cpus_per_actor=CPUS)


def measure_start(model: str, dtype: Any, repeats: int) -> dict[str, Any]:
    ready, first = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        with open_pool(model, dtype) as pool:
            ready.append(time.perf_counter() - start)
            pool.score(["What is 2 + 2? It is 4."])
            first.append(time.perf_counter() - start)
    return {
        "dtype": dtype,
        "ready_s": round(statistics.median(ready), 2),
        "first_reward_s": round(statistics.median(first), 2),
        "seconds": [round(taken, 2) for taken in first],
    }


def measure_rows(model: str, dtype: Any, passes: Sequence[pa.Table]) -> dict[str, Any]:
    """The first pass warms both up."""
    taken: dict[str, list[float]] = {"pool": [], "scorer": []}
    config = ModelConfig(model=model, seed=SEED, dtype=dtype)
    process = ProcessPoolExecutor(1, get_context("spawn"), load_scorer, (config,))
    with process, open_pool(model, dtype) as pool:
        for rows in passes:
            start = time.perf_counter()
            scored = pool.score_table(rows)
            taken["pool"].append(time.perf_counter() - start)
            seconds, added = process.submit(score, rows).result()
            taken["scorer"].append(seconds)
            if not scored.select(added.column_names).equals(added):
                raise SystemExit("The pool and the scorer gave different rewards.")
    pairs_ = list(zip(taken["pool"], taken["scorer"], strict=True))[1:]
    return {
        "dtype": dtype,
        "pool_s": round(statistics.median(pool for pool, _ in pairs_), 3),
        "scorer_s": round(statistics.median(scorer for _, scorer in pairs_), 3),
        "ratio": round(statistics.median(pool / scorer for pool, scorer in pairs_), 4),
        "seconds": [[round(pool, 3), round(scorer, 3)] for pool, scorer in pairs_],
    }


_scorer: Scorer
"""In a process of its own."""


def load_scorer(config: ModelConfig) -> None:
    import torch

    global _scorer
    torch.set_num_threads(CPUS)
    FreedMemory().keep()  # as in an actor
    _scorer = Scorer.load(config, "cpu")


def score(rows: pa.Table) -> tuple[float, pa.Table]:
    start = time.perf_counter()
    added = _scorer.score_table(rows, check_schema(rows.schema))
    return time.perf_counter() - start, added


def measure_shards(few: int, many: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_tiny(folder / "model")
        with open_pool(str(folder / "model")) as pool:
            run_job(pool, folder / "warm", 2)
            elapsed, cpu = zip(
                *(run_job(pool, folder / str(n), n) for n in (few, many)), strict=True
            )
    return {
        "shards": [few, many],
        "seconds": [round(taken, 2) for taken in elapsed],
        "driver_cpu_seconds": [round(taken, 2) for taken in cpu],
        "ms_per_shard": round(1e3 * (elapsed[1] - elapsed[0]) / (many - few), 2),
        "driver_cpu_ms_per_shard": round(1e3 * (cpu[1] - cpu[0]) / (many - few), 2),
    }


def run_job(pool: RewardPool, folder: Path, shards: int) -> tuple[float, float]:
    """Seconds, and CPU seconds of this process, for a job of so many shards of one row."""
    folder.mkdir()
    data = folder / "rows.jsonl"
    texts = (" ".join(WORDS[: 1 + row % len(WORDS)]) for row in range(shards))
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    start, cpu = time.perf_counter(), time.process_time()
    pool.score_dataset(data, folder / "scored", rows_per_shard=1)
    return time.perf_counter() - start, time.process_time() - cpu


def make_tiny(folder: Path, layers: int = 2) -> None:
    """A random Llama that takes no time, with a tokenizer of a few words."""
    words = ["<pad>", "</s>", "<unk>", *WORDS]
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **tokens).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def as_markdown(result: dict[str, Any]) -> str:
    def by_dtype(part: str, key: str, label: str, unit: str) -> list[str]:
        return [label, *(f"{run[key]} {unit}" for run in result[part])]

    shards = result["shards"]
    rows = [
        by_dtype("rows", "pool_s", "a pass by the pool", "s"),
        by_dtype("rows", "scorer_s", "a pass by a scorer", "s"),
        by_dtype("rows", "ratio", "pool over scorer", "×"),
        by_dtype("start", "ready_s", "until the pool is ready", "s"),
        by_dtype("start", "first_reward_s", "until its first reward", "s"),
        ["a further shard", f"{shards['ms_per_shard']} ms", ""],
        ["a further shard, the driver's CPU", f"{shards['driver_cpu_ms_per_shard']} ms", ""],
    ]
    return as_table(["", *DTYPES], rows)


if __name__ == "__main__":
    main()
