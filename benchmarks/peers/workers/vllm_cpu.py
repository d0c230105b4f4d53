"""vLLM's CPU build with prefix caching; it makes batches itself."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

CORES = sorted(os.sched_getaffinity(0))[:2]
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, CORES))
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "2"  # GiB: a pass fits in many times over
# for the processes that it starts, as its manual recommends
os.environ["LD_PRELOAD"] = str(Path(sys.prefix) / "lib" / "libiomp5.so")

from vllm import LLM, PoolingParams

PACKAGES = ("vllm-cpu", "torch", "transformers")


def load(checkpoint: str) -> Callable[..., list[float]]:
    # "auto" would round a float32 checkpoint
    dtype = json.loads((Path(checkpoint) / "config.json").read_text())["dtype"]
    llm = LLM(model=checkpoint, runner="pooling", dtype=dtype, enable_prefix_caching=True)
    raw = PoolingParams(use_activation=False)
    eos = llm.get_tokenizer().eos_token

    def score(groups: list[list[str]], _: None) -> list[float]:
        # vLLM pools the last token, transformers the last that is not padding, which here is EOS
        texts = [text.removesuffix(eos) for group in groups for text in group]
        llm.reset_prefix_cache()
        outputs = llm.classify(texts, pooling_params=raw, use_tqdm=False)
        return [output.outputs.probs[0] for output in outputs]

    return score
