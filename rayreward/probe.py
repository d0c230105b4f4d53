"""A fixed set of texts whose rewards show that two machines not only hold the same, but compute it.

Short, so that scoring them costs little, and unlike one another: one token and several blocks of
attention, prose, code, other scripts. Does not know how they are scored.
"""

from __future__ import annotations

from typing import Any

from rayreward.tokenization import Tokenizer
from rayreward.types import Failure, Text, Tokens

TEXTS = (
    "Yes",
    "What is 2 + 2? It is 4.",
    "Fragen kostet nichts, 質問は無料です, спросить можно всегда.",
    "def mean(values): return sum(values) / len(values) if values else float('nan')",
    "A scale shows the same weight whoever stands in the queue behind. It does so today and "
    "tomorrow, here and elsewhere, whether the last thing weighed was a feather or a brick. If two "
    "scales differ by a hair, at least one of them is off, and it is better to know it before the "
    "market opens than after the last customer has gone home with a pound of something else.",
)


def encode_probe(hf: Any, max_length: int | None) -> list[Tokens | Failure]:
    """The texts as token ids, each cut on the right to `max_length`."""
    tokenizer = Tokenizer(hf, max_length=max_length, truncation="right")
    return tokenizer.encode([Text("", text) for text in TEXTS])
