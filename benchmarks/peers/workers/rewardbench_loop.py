"""RewardBench's inference loop: batches of 8 in file order, padded on the left, side by side.

Source: rewardbench 0.1.4, rewardbench.py and RewardBenchPipeline in models/pipeline.py. It is
reproduced because the package asks for transformers 4.51.0, which is not what everybody else here
runs, and its pipeline sends every batch to "cuda". Left out are its log lines and its search for a
doubled BOS, which these texts don't have.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

PACKAGES = ("torch", "transformers")
BATCH_SIZES = (8,)
"""The default of --batch_size."""


def load(checkpoint: str) -> Callable[..., list[float]]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.padding_side = "left"
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()

    def reward_pipe(samples: list[str]) -> list[float]:
        inputs = tokenizer(samples, truncation=False, padding=True, return_tensors="pt")
        with torch.no_grad():
            return model(**inputs).logits[:, 0].float().cpu().numpy().tolist()

    def score(groups: list[list[str]], batch_size: int) -> list[float]:
        if any(len(group) != 2 for group in groups):
            texts = [text for group in groups for text in group]
            batches = DataLoader(texts, batch_size=batch_size)
            return [reward for batch in batches for reward in reward_pipe(batch)]
        rewards = []
        for chosen, rejected in DataLoader(groups, batch_size=batch_size):
            pairs = zip(reward_pipe(chosen), reward_pipe(rejected), strict=True)
            rewards += [reward for pair in pairs for reward in pair]
        return rewards

    return score
