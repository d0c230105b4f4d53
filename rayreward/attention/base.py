"""What attention over a flat stream is asked for, whatever computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

Index = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Score:
    """What a layer makes of the product of a query and a key before the softmax."""

    scaling: float | None
    """Its factor; null for 1/√D."""
    window: int | None
    """How many places back a query sees, its own included; null for all."""
    softcap: float | None
    """What it is squashed to lie within; null for as it is."""


class Attention(Protocol):
    """Attention over one stream of T tokens."""

    causal: bool
    """Whether a token sees those before it only, or all of its text."""

    @property
    def calls(self) -> int:
        """How often it was asked so far."""

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, score: Score
    ) -> torch.Tensor:
        """Takes `(T, heads, D)` each, keys and values perhaps with fewer heads.

        Returns:
            `(T, heads, D)`; zeros in places that no text is the one to compute.
        """


def on_device(device: torch.device, values: NDArray[Any]) -> torch.Tensor:
    """Copies numbers to a device, without waiting for what a GPU is still doing."""
    tensor = torch.from_numpy(values)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
