"""sentence-transformers' CrossEncoder, without an activation; it sorts by length itself."""

from __future__ import annotations

from collections.abc import Callable

from sentence_transformers import CrossEncoder
from torch import nn

PACKAGES = ("sentence-transformers", "torch", "transformers")
BATCH_SIZES = (1, 4, 8, 16)


def load(checkpoint: str) -> Callable[..., list[float]]:
    model = CrossEncoder(
        checkpoint,
        num_labels=1,
        activation_fn=nn.Identity(),
        # with one, it would write every text into a conversation
        processor_kwargs={"chat_template": None},
    )

    def score(groups: list[list[str]], batch_size: int) -> list[float]:
        pairs = [(text, "") for group in groups for text in group]
        return model.predict(pairs, batch_size=batch_size, show_progress_bar=False).tolist()

    return score
