"""TRL's GRPOTrainer with a reward model: each per-device batch is padded and run as it comes.

Source: TRL 1.16, GRPOTrainer._calculate_rewards.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

PACKAGES = ("trl", "torch", "transformers")
BATCH_SIZES = (4, 8, 16)
"""per_device_train_batch_size"""


def load(checkpoint: str) -> Callable[..., list[float]]:
    reward_processing_class = AutoTokenizer.from_pretrained(checkpoint)
    reward_func = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()

    def calculate_rewards(texts: list[str]) -> list[float]:
        reward_inputs = reward_processing_class(
            text=texts,
            return_tensors="pt",
            padding=True,
            padding_side="right",
            add_special_tokens=False,
        )
        with torch.inference_mode():
            return reward_func(**reward_inputs).logits[:, 0].tolist()

    def score(groups: list[list[str]], batch_size: int) -> list[float]:
        texts = [text for group in groups for text in group]
        starts = range(0, len(texts), batch_size)
        batches = [calculate_rewards(texts[start : start + batch_size]) for start in starts]
        return [reward for batch in batches for reward in batch]

    return score
