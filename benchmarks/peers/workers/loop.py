"""A plain transformers loop: sorted by length, batches padded on the right."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

PACKAGES = ("torch", "transformers")
BATCH_SIZES = (1, 4, 8, 16)


def load(checkpoint: str) -> Callable[..., list[float]]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="right")
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()

    @torch.inference_mode()
    def score(groups: list[list[str]], batch_size: int) -> list[float]:
        texts = [text for group in groups for text in group]
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        rewards = [0.0] * len(texts)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            inputs = tokenizer([texts[i] for i in batch], padding=True, return_tensors="pt")
            found = model(**inputs).logits[:, 0].tolist()
            for index, reward in zip(batch, found, strict=True):
                rewards[index] = reward
        return rewards

    return score
