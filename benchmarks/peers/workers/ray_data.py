"""Ray Data: map_batches with one actor. Each execution starts it anew, and that is counted."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import ray
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

PACKAGES = ("ray", "torch", "transformers")
BATCH_SIZES = (8,)


class Scorer:
    """What the documentation of map_batches has for a model. It also tells when it was loaded."""

    def __init__(self, checkpoint: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="right")
        self.model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
        self.loaded = time.time()

    @torch.inference_mode()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        inputs = self.tokenizer(list(batch["text"]), padding=True, return_tensors="pt")
        batch["reward"] = self.model(**inputs).logits[:, 0].float().numpy()
        batch["loaded"] = np.full(len(batch["text"]), self.loaded)
        return batch


def load(checkpoint: str) -> Callable[..., dict[str, Any]]:
    ray.init()
    ray.data.DataContext.get_current().execution_options.preserve_order = True

    def score(groups: list[list[str]], batch_size: int) -> dict[str, Any]:
        texts = [{"text": text} for group in groups for text in group]
        scored = ray.data.from_items(texts).map_batches(
            Scorer,
            fn_constructor_args=(checkpoint,),
            batch_size=batch_size,
            compute=ray.data.ActorPoolStrategy(size=1),
            num_cpus=2,
        )
        rows = scored.take_all()
        return {
            "rewards": [row["reward"] for row in rows],
            "once_loaded_s": time.time() - rows[0]["loaded"],
        }

    return score
