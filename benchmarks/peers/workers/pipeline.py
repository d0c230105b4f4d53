"""transformers' text-classification pipeline, without an activation, in file order."""

from __future__ import annotations

from collections.abc import Callable

from transformers import pipeline

PACKAGES = ("torch", "transformers")
BATCH_SIZES = (1, 4, 8, 16)


def load(checkpoint: str) -> Callable[..., list[float]]:
    classify = pipeline("text-classification", model=checkpoint, function_to_apply="none")

    def score(groups: list[list[str]], batch_size: int) -> list[float]:
        texts = [text for group in groups for text in group]
        return [found["score"] for found in classify(texts, batch_size=batch_size)]

    return score
