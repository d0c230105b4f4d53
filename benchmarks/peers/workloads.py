"""The rows of a pass, as groups of texts that begin alike. Every pass has rows of its own."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from rayreward.packing import has_bfloat16, is_fast

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "formats" / "pairs_text.parquet"
HH = ROOT.parent / "shared" / "data" / "hh-harmless-test.jsonl.gz"
"""`harmless-base/test.jsonl.gz` of hh-rlhf (MIT), which is not part of this project."""


SOME = "the of and to in is that for it was on are as with be this from or have by not but"
WORDS = SOME.split()
"""Each is one token with the space before it."""

PAIRS = 12 if has_bfloat16() and is_fast(torch.bfloat16) else 6
"""Of a pass. It and its like are chosen so that all peers and workloads take less than 20 minutes:
half as many rows where peers are slow in bfloat16."""

Groups = list[list[str]]

LARGE_BATCH = 16
MANY_TOKENS = 1_024
"""What a choice of batch size is made on, about: one large batch, or this many tokens."""

REHEARSAL = 999
"""The pass whose rows are for warming up and for choosing a batch size."""


@dataclass(frozen=True)
class Workload:
    says: str
    groups: Callable[[int], Groups]


class Rows:
    """A workload's texts as everybody gets them: each ends in EOS, as TRL's reward trainer has it.

    Attributes:
        passes: The groups of each pass.
        one: A text of the workload's to warm up on.
        short: A text of 32 words, for who comes back from a break.
        some: Groups to choose a batch size on.
    """

    def __init__(self, workload: Workload, passes: int, tokenizer: Any) -> None:
        def groups(pass_: int) -> Groups:
            texts = workload.groups(pass_)
            return [[text + tokenizer.eos_token for text in group] for group in texts]

        self.passes = [groups(pass_) for pass_ in range(passes)]
        rehearsal = groups(REHEARSAL)
        self.one = [rehearsal[0][:1]]
        self.short = [[words(random.Random(REHEARSAL), 32) + tokenizer.eos_token]]
        self.some = list(enough(rehearsal, tokenizer))
        self._says, self._tokenizer = workload.says, tokenizer

    def describe(self) -> dict[str, Any]:
        texts = [[text for group in groups for text in group] for groups in self.passes]
        tokens = [sum(map(len, self._tokenizer(each)["input_ids"])) for each in texts]
        return {"says": self._says, "texts": [len(each) for each in texts], "tokens": tokens}


def enough(groups: Groups, tokenizer: Any) -> Iterator[list[str]]:
    """Groups, the last one perhaps in part, until they make one large batch or many tokens."""
    texts = tokens = 0
    for group in groups:
        taken = []
        for text in group:
            if texts < LARGE_BATCH and tokens < MANY_TOKENS:
                taken.append(text)
                texts += 1
                tokens += len(tokenizer(text)["input_ids"])
        if taken:
            yield taken


def hh_pairs(pass_: int) -> Groups:
    with gzip.open(HH, "rt") as lines:
        rows = [json.loads(line) for line in turn(list(lines), pass_)]
    return [[row["chosen"], row["rejected"]] for row in rows]


def example_pairs(pass_: int) -> Groups:
    rows = turn(pq.read_table(EXAMPLES).to_pylist(), pass_)
    return [[row.get("prompt", "") + row[side] for side in ("chosen", "rejected")] for row in rows]


def turn(rows: list[Any], pass_: int) -> list[Any]:
    start = pass_ * PAIRS % (len(rows) - len(rows) % PAIRS)
    return rows[start : start + PAIRS]


def completions(pass_: int) -> Groups:
    dice = random.Random(pass_)
    prompt = words(dice, 512)
    return [[prompt + words(dice, 64) for _ in range(8)]]


def long(pass_: int) -> Groups:
    dice = random.Random(pass_)
    return [[words(dice, 1_024)] for _ in range(PAIRS // 6)]


def short(pass_: int) -> Groups:
    dice = random.Random(pass_)
    return [[words(dice, 32)] for _ in range(4 * PAIRS)]


def words(dice: random.Random, count: int) -> str:
    return "".join(f" {dice.choice(WORDS)}" for _ in range(count))


SOURCE = ("hh-harmless-test", hh_pairs) if HH.exists() else ("the examples", example_pairs)
WORKLOADS = {
    "pairs": Workload(f"{PAIRS} pairs of {SOURCE[0]}, chosen and rejected", SOURCE[1]),
    "completions": Workload("8 completions of 64 tokens to a prompt of 512", completions),
    "long": Workload(f"{PAIRS // 6} × a text of 1,024 tokens", long),
    "short": Workload(f"{4 * PAIRS} texts of 32 tokens", short),
}
