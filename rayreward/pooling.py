"""How a model comes from the states of a text's tokens to what its head's last layer takes.

Found by a trial against the model's own rewards, never by names: an architecture that pools in
another way would give wrong rewards without a word. Does not know batches, layouts or kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch

from rayreward.attention import on_device
from rayreward.errors import ModelError
from rayreward.head import Head
from rayreward.positions import pooled_position

Pooling = Literal["last", "mean"]
"""The state of a text's last token that is no padding, or the mean of the states of all tokens.

A mean of rewards is the reward of a mean, since the head's last layer is linear.
"""

_TOLERANCE = 1e-3
"""How far a reward may be from the model's own, relative to its largest possible size: above what
float32 loses in another order of summation, below what another token makes of it."""


def pooled(
    hidden: torch.Tensor, texts: Sequence[Sequence[int]], pooling: Pooling, pad_id: int
) -> torch.Tensor:
    """What the head's last layer takes of each text.

    Args:
        hidden: What reaches that layer: `(N, H)` where the model has pooled already, as encoders
            do, or `(N, L, H)`, padded on the right.
        texts: Their N token ids.
        pooling: What a text's states come to.
        pad_id: The token that the last one is looked for past.

    Returns:
        `(N, H)`.
    """
    if hidden.dim() == 2:
        return hidden
    if pooling == "mean":
        own = [states[: len(text)] for states, text in zip(hidden, texts, strict=True)]
        return torch.stack([states.float().mean(0) for states in own])
    last = np.array([pooled_position(text, pad_id) for text in texts])
    rows = torch.arange(len(texts), device=hidden.device)
    return hidden[rows, on_device(hidden.device, last)]


def find_pooling(
    name: str,
    head: Head,
    forward: Callable[[Sequence[int]], Any],
    texts: Sequence[Sequence[int]],
    pad_id: int,
) -> tuple[Pooling, torch.Tensor]:
    """Tries how rewards come out as the model's own forward has them.

    Args:
        name: Of the architecture, for messages.
        head: The model's.
        forward: Runs the model on one text alone, as transformers does.
        texts: N token ids to try it with.
        pad_id: As for `pooled`.

    Returns:
        The pooling, and what the last layer takes by it of each text, `(N, H)` float32.

    Raises:
        ModelError: The model can't run on a text's tokens alone, or pools in a way of its own.
    """
    states, rewards = [], []
    for text in texts:
        try:
            hidden, logits = head.followed(partial(forward, text))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever an architecture needs besides, or can't compute
            reason = (str(error).strip().splitlines() or ["no reason given"])[0].rstrip(".")
            raise ModelError(
                f"{name} can't be scored: given the tokens of a text and nothing else, "
                f"transformers' own forward pass ends with {type(error).__name__}: {reason}. Use a "
                "decoder or an encoder that scores plain text; where it is about number types, "
                "dtype='float32'."
            ) from error
        states.append(hidden)
        rewards.append(logits.flatten()[:1])
    own = torch.cat(rewards).float()
    for pooling in get_args(Pooling):
        alone = zip(states, texts, strict=True)
        taken = torch.cat([pooled(hidden, [text], pooling, pad_id) for hidden, text in alone])
        fits = (head.rewards(taken) - own).abs() <= _TOLERANCE * head.scale(taken)
        if (fits | ~own.isfinite()).all():  # what is no number says nothing about pooling
            return pooling, taken.float()
    raise ModelError(
        f"{name} can't be scored: it makes its rewards neither from the last token of a text nor "
        "from the mean of all of them, so they would not be transformers' own. Use an architecture "
        "that pools in one of these ways, or before its head, as BERT does."
    )
