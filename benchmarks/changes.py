"""What `determinism.py` changes around a text, and in which of its tables each change stands.

Knows what is tried; does not know how texts are scored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

SMOLLM, BLOOM = "SmolLM2-135M", "small Bloom"
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Setting:
    """A way of scoring all texts. The defaults are what everything is compared with."""

    way: str
    """`transformers` or `rayreward`."""
    model: str
    dtype: str = "float32"
    batch: int | None = 1
    """Texts in a call. None: all of them."""
    order: str = "file"
    """`file`, `length` or `shuffled`."""
    padding: str = "right"
    attention: str = "sdpa"
    budget: int = 2_048
    """RayReward's max_batch_tokens."""
    pairs: bool = False
    """Whether the two sides of a pair go together, as from a dataset of pairs."""
    share: bool = True
    """RayReward's share_prefixes."""
    invariant: bool = False
    """RayReward's batch_invariant. False: nothing is tried at load; batches are those of "auto"."""
    threads: int = 2
    device: str = "cpu"


@dataclass(frozen=True)
class Change:
    """What is done otherwise.

    Attributes:
        label: What the table calls it.
        fields: The fields of `Setting` that change.
        ways: The ways of scoring that have such a thing.
        environment: Variables for a process of its own. None: the process of the texts alone.
    """

    label: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    ways: Sequence[str] = ("transformers", "rayreward")
    environment: Mapping[str, str] | None = None


def with_variable(name: str, value: str, meaning: str) -> Change:
    return Change(f"{meaning} (`{name}={value}`)", environment={name: value})


PLAIN, OURS = ("transformers",), ("rayreward",)
TOGETHER = {"batch": None, "pairs": True}
NOTHING = Change("each text alone")
BATCHES = [
    Change("batches of 8, in file order", {"batch": 8}),
    Change("batches of 8, sorted by length", {"batch": 8, "order": "length"}),
    Change("batches of 8, shuffled", {"batch": 8, "order": "shuffled"}),
    Change("batches of 8, padded on the left", {"batch": 8, "padding": "left"}, PLAIN),
    Change("batches of 16, in file order", {"batch": 16}),
    Change("all at once, 1,024 tokens a batch", {"batch": None, "budget": 1_024}, OURS),
    Change("all at once, 2,048 tokens a batch", {"batch": None}, OURS),
    Change("all at once, 4,096 tokens a batch", {"batch": None, "budget": 4_096}, OURS),
]
THREADS = Change("1 thread instead of 2", {"threads": 1})
CHANGES = {
    SMOLLM: [
        NOTHING,
        Change("the same again"),
        Change("the same in another process", environment={}),
        *BATCHES,
        Change("in pairs, their prompt run once", TOGETHER, OURS),
        Change("in pairs, their prompt run twice", {**TOGETHER, "share": False}, OURS),
        THREADS,
        Change("eager attention instead of SDPA", {"attention": "eager"}, PLAIN),
        with_variable("ATEN_CPU_CAPABILITY", "avx2", "ATen with AVX2 only"),
        with_variable("ATEN_CPU_CAPABILITY", "default", "ATen without AVX"),
        with_variable("MKL_CBWR", "COMPATIBLE", "MKL's code for any processor"),
        with_variable("ONEDNN_MAX_CPU_ISA", "AVX512_CORE", "oneDNN without bfloat16 units"),
        Change("bfloat16 instead of float32", {"dtype": "bfloat16"}),
    ],
    BLOOM: [NOTHING, *BATCHES, THREADS],
}
if torch.cuda.is_available():
    for changes in CHANGES.values():
        changes.append(Change("on the GPU", {"device": "cuda:0"}))

COLUMNS = {
    SMOLLM: {
        "transformers": Setting("transformers", SMOLLM),
        "RayReward": Setting("rayreward", SMOLLM),
    },
    BLOOM: {
        "transformers": Setting("transformers", BLOOM, attention="eager"),  # it has no other
        "RayReward": Setting("rayreward", BLOOM),
        "batch_invariant=True": Setting("rayreward", BLOOM, invariant=True),
    },
}
"""By model, what the changes are made to."""


@dataclass(frozen=True)
class Case:
    """A change, made to one column of one model's table, in one dtype."""

    model: str
    dtype: str
    column: str
    change: Change

    @property
    def setting(self) -> Setting:
        fields = {"dtype": self.dtype, **self.change.fields}
        return replace(COLUMNS[self.model][self.column], **fields)

    @property
    def key(self) -> str:
        return f"{self.model}, {self.dtype}, {self.column}, {self.change.label}"

    @property
    def columns(self) -> dict[str, str]:
        """Where it is in the tables."""
        return {"model": self.model, "column": self.column, "dtype": self.dtype}


CASES = [
    Case(model, dtype, column, change)
    for model, columns in COLUMNS.items()
    for dtype in DTYPES
    for column, setting in columns.items()
    for change in CHANGES[model]
    if setting.way in change.ways and change.fields.get("dtype") != dtype
]
