"""What several benchmarks need: rows, hardware and versions, what a model multiplies, tables."""

from __future__ import annotations

import gzip
import json
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from hh import DATASET, ROOT, cpu_name
from torch import nn
from transformers import AutoModel, PretrainedConfig

from rayreward import __version__
from rayreward.sizes import Sizes
from rayreward.types import Branch

RESULTS = ROOT / "benchmarks" / "results"
EXAMPLES = ROOT / "examples" / "formats" / "pairs_text.parquet"


def smollm2() -> str:
    """The directory of the SmolLM2-135M checkpoint."""
    command = [sys.executable, ROOT / "examples" / "smollm2.py"]
    return subprocess.check_output(command, text=True).strip()


def pairs(count: int) -> tuple[str, list[dict[str, str]]]:
    """Where they are from, and as many pairs, from the start; the example pairs come round again.

    The pairs are those of hh-harmless-test where they lie beside the checkout (`benchmarks/hh.py`).
    """
    if DATASET.exists():
        with gzip.open(DATASET, "rt", encoding="utf-8") as lines:
            return DATASET.name, [json.loads(line) for line in islice(lines, count)]
    rows = pq.read_table(EXAMPLES).to_pylist()
    return EXAMPLES.name, [rows[index % len(rows)] for index in range(count)]


def hardware() -> dict[str, Any]:
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "machine": platform.machine()}


def versions(*packages: str) -> dict[str, str]:
    found = {name: metadata.version(name) for name in ("torch", "transformers", *packages)}
    return {"rayreward": __version__, "python": platform.python_version(), **found}


def linear_shapes(config: PretrainedConfig) -> Counter[tuple[int, int]]:
    """`(out, in)` of every linear layer of the body, and how many there are of it.

    Taken from the architecture, since a loaded model may have replaced its layers.
    """
    with torch.device("meta"):
        body = AutoModel.from_config(config)
    layers = (module for module in body.modules() if isinstance(module, nn.Linear))
    return Counter((layer.out_features, layer.in_features) for layer in layers)


def linear_parameters(config: PretrainedConfig) -> int:
    return sum(rows * columns * count for (rows, columns), count in linear_shapes(config).items())


def stream_tokens(batch: Iterable[Branch], sizes: Sizes) -> int:
    """Tokens that a flat stream of these texts has, filled up."""
    return sizes.filled(sum(branch.own for branch in batch))


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def as_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
