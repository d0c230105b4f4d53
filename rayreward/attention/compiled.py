"""Attention by our own kernel for CPUs, which sums in one order by construction."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch.profiler import record_function

from rayreward.attention.base import Index, Score
from rayreward.native import Kernels, find_kernels
from rayreward.operators import entered


class _Layout(ctypes.Structure):
    """`Layout` of `native/attention.h`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("places", "lengths", "owned_from")),
        *((name, ctypes.c_int64) for name in ("texts", "owned", "causal", "calls")),
    )


class _Angles(ctypes.Structure):
    """`Angles` of `native/attention.h`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("cosines", "sines")),
        *((name, ctypes.c_int64) for name in ("cosines_place", "sines_place")),
    )


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
        self._kernel = kernels.attention
        owned = np.concatenate([t[first:] for t, first in zip(texts, owned_from, strict=True)])
        from_the_first_on = np.array_equal(owned, np.arange(len(owned)))
        self._held = (
            np.concatenate(texts),
            np.array([len(text) for text in texts]),
            np.array(owned_from),
        )
        self._layout = _Layout(
            *(array.ctypes.data for array in self._held),
            len(texts),
            len(owned) if from_the_first_on else 0,
            causal,
            0,
        )

    @property
    def calls(self) -> int:
        """As in `Attention`."""
        return int(self._layout.calls)

    def entered(self) -> contextlib.AbstractContextManager[None]:
        """While it is in force, compiled graphs on this thread attend by it."""
        return entered(self._kernel, self._layout)

    def attend(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        score: Score,
        angles: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """As in `Attention`.

        Args:
            queries: `(T, heads, D)`.
            keys: `(T, kv_heads, D)`.
            values: `(T, kv_heads, E)`.
            score: What becomes of their products.
            angles: Cosines and sines, `(T, D)` each, of the type of queries and keys, which are
                turned by them first (rotary embeddings); null for as they are.

        Raises:
            ValueError: The tensors are neither float32 nor bfloat16.
        """
        if queries.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"the compiled kernel has no {queries.dtype}")
        self._layout.calls += 1
        queries, keys, values = (
            x if x.stride(2) == 1 else x.contiguous() for x in (queries, keys, values)
        )
        turned = None
        if angles is not None:
            cosines, sines = (x if x.stride(1) == 1 else x.contiguous() for x in angles)
            turned = _Angles(
                cosines.data_ptr(), sines.data_ptr(), cosines.stride(0), sines.stride(0)
            )
        tokens, heads, depth = queries.shape
        kv_heads, value_depth = keys.shape[1], values.shape[2]
        results = queries.new_empty((tokens, heads, value_depth))
        tensors = (queries, keys, values, results)
        strides = np.array([x.stride()[:2] for x in tensors])
        with record_function("rayreward::attention"):
            self._kernel(
                queries.dtype is torch.bfloat16,
                *(x.data_ptr() for x in tensors),
                strides.ctypes.data,
                tokens,
                kv_heads,
                heads // kv_heads,
                depth,
                value_depth,
                None if turned is None else ctypes.addressof(turned),
                ctypes.addressof(self._layout),
                depth**-0.5 if score.scaling is None else score.scaling,
                score.softcap or 0.0,
                score.window or 0,
                torch.get_num_threads(),
            )
        return results
