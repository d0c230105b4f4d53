"""What stands between the products of a decoder's layer, each in one pass over memory, on a CPU.

RMS norms, gated activations (SiLU) and rotary embeddings, by the kernels of `rayreward.native`.
Modules stay where they are, with their weights; only what computes them changes, and only where a
trial finds that it computes the same. Knows how transformers writes these modules; does not know
what they are part of.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.profiler import record_function

from rayreward.native import Kernels, find_kernels

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""How far a row of a result may be from that of the module, relative to its length."""

_ROTARY = "apply_rotary_pos_emb"
"""The function that transformers' attention modules call for it."""


def fuse(module: nn.Module) -> Callable[[], None]:
    """Has a model's modules computed by our kernels, where those compute the same.

    Args:
        module: On a CPU.

    Returns:
        What undoes it.
    """
    kernels = find_kernels()
    changed: list[nn.Module] = []
    if isinstance(kernels, Kernels):
        rotations: dict[Any, Callable[..., Any] | None] = {}
        for part in module.modules():
            for make in (_norm, _gated, _rotated(rotations)):
                forward = make(part, kernels)
                if forward is not None:
                    part.forward = MethodType(forward, part)
                    changed.append(part)
                    break

    def undo() -> None:
        for part in changed:
            del part.forward

    return undo


_Forward = Callable[..., Any]


def _norm(part: nn.Module, kernels: Kernels) -> _Forward | None:
    """For an RMS norm over the last dimension."""
    weight = getattr(part, "weight", None)
    epsilon = getattr(part, "variance_epsilon", getattr(part, "eps", None))
    named = type(part).__name__.endswith("RMSNorm")
    if not (named and isinstance(weight, torch.Tensor) and isinstance(epsilon, float)):
        return None

    def forward(part: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        x, weight = hidden_states.contiguous(), part.weight
        result = torch.empty_like(x)
        with record_function("rayreward::rms_norm"):
            kernels.rms_norm(
                x.dtype is torch.bfloat16,
                *(tensor.data_ptr() for tensor in (x, weight, result)),
                x.numel() // x.shape[-1],
                x.shape[-1],
                epsilon,
                torch.get_num_threads(),
            )
        return result

    sample = _sample((3, weight.numel()), weight.dtype)
    return forward if weight.dim() == 1 and _agree(part, forward, sample) else None


def _gated(part: nn.Module, kernels: Kernels) -> _Forward | None:
    """For `down(silu(gate(x)) * up(x))`."""
    layers = [getattr(part, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(layer, nn.Module) for layer in layers):
        return None

    def forward(part: Any, x: torch.Tensor) -> torch.Tensor:
        gates, ups = part.gate_proj(x), part.up_proj(x)
        with record_function("rayreward::silu_times"):
            kernels.silu_times(
                gates.dtype is torch.bfloat16,
                *(tensor.data_ptr() for tensor in (gates, ups, gates)),
                gates.numel(),
                torch.get_num_threads(),
            )
        result: torch.Tensor = part.down_proj(gates)
        return result

    width, dtype = getattr(part, "hidden_size", None), _dtype(layers[0])
    if not isinstance(width, int) or dtype is None:
        return None
    # activations are hard to tell apart near zero
    sample = _sample((1, 3, width), dtype) * torch.tensor([1, 10, 100], dtype=dtype)[:, None]
    return forward if _agree(part, forward, sample) else None


def _rotated(
    tried: dict[Any, Callable[..., Any] | None],
) -> Callable[[nn.Module, Kernels], _Forward | None]:
    """For an attention module that turns queries and keys before it attends."""

    def make(part: nn.Module, kernels: Kernels) -> _Forward | None:
        forward: Any = type(part).forward
        if not isinstance(forward, FunctionType) or _ROTARY not in forward.__code__.co_names:
            return None
        original = forward.__globals__.get(_ROTARY)
        depth, dtype = getattr(part, "head_dim", None), _dtype(part)
        if original is None or not isinstance(depth, int) or dtype is None:
            return None
        key = original, depth, dtype
        if key not in tried:
            tried[key] = _rotation(original, depth, dtype, kernels)
        if tried[key] is None:
            return None
        # the same code, which finds our function under the name of the other
        names = {**forward.__globals__, _ROTARY: tried[key]}
        copy = FunctionType(
            forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
        )
        copy.__kwdefaults__ = forward.__kwdefaults__
        return copy

    return make


def _rotation(
    original: Callable[..., Any], depth: int, dtype: torch.dtype, kernels: Kernels
) -> Callable[..., Any] | None:
    def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        rows = x[0].transpose(0, 1)  # (places, heads, depth)
        rows = rows if rows.stride(2) == 1 else rows.contiguous()
        result = torch.empty(rows.shape, dtype=x.dtype)
        strides = np.array([rows.stride()[:2], result.stride()[:2]])
        with record_function("rayreward::rotate"):
            kernels.rotate(
                x.dtype is torch.bfloat16,
                *(tensor.data_ptr() for tensor in (rows, cosine, sine, result)),
                strides.ctypes.data,
                *rows.shape,
                torch.get_num_threads(),
            )
        return result.transpose(0, 1)[None]

    def fused(
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *more: Any,
        **named: Any,
    ) -> Any:
        shape = (1, q.shape[2], q.shape[3])
        alike = {q.dtype, k.dtype, cos.dtype, sin.dtype}
        if more or named or cos.shape != shape or sin.shape != shape or len(alike) > 1:
            return original(q, k, cos, sin, *more, **named)
        cos, sin = cos.contiguous(), sin.contiguous()
        return rotate(q, cos, sin), rotate(k, cos, sin)

    q, k = _sample((1, 3, 5, depth), dtype), _sample((1, 2, 5, depth), dtype)
    cos, sin = _sample((1, 5, depth), dtype), _sample((1, 5, depth), dtype).flip(-1)
    try:
        pairs = zip(fused(q, k, cos, sin), original(q, k, cos, sin), strict=True)
        return fused if all(_close(ours, theirs) for ours, theirs in pairs) else None
    except (RuntimeError, TypeError, ValueError):
        return None


def _agree(part: nn.Module, forward: _Forward, sample: torch.Tensor) -> bool:
    if sample.dtype not in _TOLERANCE:
        return False
    try:
        return _close(forward(part, sample), part(sample))
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False


def _close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    if ours.shape != theirs.shape or ours.dtype is not theirs.dtype:
        return False
    error = (ours.float() - theirs.float()).norm(dim=-1)
    return bool((error <= _TOLERANCE[ours.dtype] * theirs.float().norm(dim=-1)).all())


def _sample(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    values = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(values).to(dtype)


def _dtype(part: Any) -> torch.dtype | None:
    """That a part computes in."""
    held = [getattr(layer, "dtype", None) for layer in part.modules()]
    found = [dtype for dtype in held if isinstance(dtype, torch.dtype)]
    found += [tensor.dtype for tensor in part.parameters()]
    return found[0] if found and found[0] in _TOLERANCE else None
