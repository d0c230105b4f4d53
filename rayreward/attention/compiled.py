"""Attention by our own kernel for CPUs, which sums in one order by construction."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.profiler import record_function

from rayreward.attention.base import Index, Score
from rayreward.native import Kernels, find_kernels


class Compiled:
    """Attention by our own kernel for CPUs (`rayreward.native`). Implements `Attention`."""

    def __init__(
        self,
        texts: Sequence[Index],
        owned_from: Sequence[int],
        device: torch.device,
        *,
        causal: bool,
    ) -> None:
        """Takes what `make_attention` does.

        Raises:
            ValueError: There is no such kernel here.
        """
        kernels = find_kernels()
        if not isinstance(kernels, Kernels) or device.type != "cpu":
            raise ValueError(f"no compiled kernel on {device}: {kernels}")
        self.causal = causal
        self._compute = kernels.attention
        self._places = np.concatenate(texts)
        self._lengths = np.array([len(text) for text in texts])
        self._owned_from = np.array(owned_from)
        owned = np.concatenate([t[first:] for t, first in zip(texts, owned_from, strict=True)])
        from_the_first_on = np.array_equal(owned, np.arange(len(owned)))
        self._computed = len(owned) if from_the_first_on else 0  # what follows is set to 0

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, score: Score
    ) -> torch.Tensor:
        """As in `Attention`.

        Raises:
            ValueError: The tensors are neither float32 nor bfloat16.
        """
        if queries.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"the compiled kernel has no {queries.dtype}")
        queries, keys, values = (
            x if x.stride(2) == 1 else x.contiguous() for x in (queries, keys, values)
        )
        depth, kv_heads = queries.shape[2], keys.shape[1]
        results = queries.new_empty((*queries.shape[:2], values.shape[2]))
        results[self._computed :] = 0
        tensors = (queries, keys, values, results)
        strides = np.array([x.stride()[:2] for x in tensors])
        with record_function("rayreward::attention"):
            self._compute(
                queries.dtype is torch.bfloat16,
                *(x.data_ptr() for x in tensors),
                strides.ctypes.data,
                kv_heads,
                queries.shape[1] // kv_heads,
                depth,
                values.shape[2],
                self._places.ctypes.data,
                self._lengths.ctypes.data,
                self._owned_from.ctypes.data,
                len(self._lengths),
                depth**-0.5 if score.scaling is None else score.scaling,
                score.softcap or 0.0,
                score.window or 0,
                self.causal,
                torch.get_num_threads(),
            )
        return results
