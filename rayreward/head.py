"""The classification head: drawn from a seed where a checkpoint has none, and applied in float64.

A *head* is every weight outside the body (and a pooler inside it, which encoders train along).
Its last linear layer turns one vector into one reward; that layer is taken out of the model and
applied here, to each row alike. Does not know how a model is loaded, tokenized or batched.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rayreward.errors import ModelError

_POOLER = re.compile(r"(^|\.)pooler\.")

_NOT_REACHED = "the forward pass never reached the head"


def is_head(name: str, base_prefix: str) -> bool:
    """Whether a parameter belongs to the head rather than to the body.

    Args:
        name: Full parameter name, such as `score.weight` or `bert.pooler.dense.bias`.
        base_prefix: The model's `base_model_prefix`.
    """
    return not name.startswith(f"{base_prefix}.") or _POOLER.search(name) is not None


@contextlib.contextmanager
def seeded_draws(seed: int) -> Iterator[None]:
    """Inside, every random number that *this thread* draws on the CPU comes from `seed`.

    The numbers are those that `torch.manual_seed(seed)` would give, but they come from a generator
    of their own: the process's global RNG is neither read nor moved, and other threads draw as
    before. So a model class can run its own weight initialisation, whatever its shape, and stay
    reproducible.
    """
    with _DrawFrom(torch.Generator(device="cpu").manual_seed(seed)):
        yield


class _DrawFrom(TorchDispatchMode):
    """Hands a generator to every random operator on the CPU that was given none."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = generator

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        if is_random and _on_cpu(args, kwargs) and kwargs.get("generator") is None:
            if not any(argument.name == "generator" for argument in func._schema.arguments):
                func = func.overloadpacket.generator  # rand and its like have two forms
            kwargs["generator"] = self._generator
        return func(*args, **kwargs)


def _on_cpu(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operator works on the CPU: on a tensor there, or making a new one there."""
    if args and isinstance(args[0], torch.Tensor):
        return args[0].device.type == "cpu"
    return torch.device(kwargs.get("device") or "cpu").type == "cpu"


class Head:
    """The head of a loaded model, its last layer taken over.

    The modules before the last layer (a dense layer, a pooler) stay in the model and run in
    float32. The last layer's input is caught and its product computed here.

    Attributes:
        tensors: Every weight of the head by its name, sorted by name: the live ones, so that a
            hash over them sees what the next reward is computed from.
    """

    def __init__(self, model: nn.Module, base_prefix: str) -> None:
        """Takes over the last layer of a model.

        Raises:
            ModelError: There is none with one output, or there are several.
        """
        self.tensors: Mapping[str, torch.Tensor] = {
            name: parameter.detach()
            for name, parameter in sorted(model.named_parameters())
            if is_head(name, base_prefix)
        }
        name, last = _last_layer(model, base_prefix)
        self._weight = last.weight.detach()
        self._bias = None if last.bias is None else last.bias.detach()
        self._catch = _Catch()
        _replace(model, name, self._catch)
        for module in _roots(model, base_prefix):
            module.register_forward_pre_hook(_to_float32)

    def caught(self, forward: Callable[[], object]) -> torch.Tensor:
        """Runs a forward pass up to the last layer; returns what it gets.

        Returns:
            `(B, H)`, or `(B, L, H)` where the model pools after its head.

        Raises:
            ValueError: The forward pass never reaches the head.
        """
        try:
            forward()
        except _Caught as caught:
            return caught.hidden
        raise ValueError(_NOT_REACHED)

    def followed(self, forward: Callable[[], Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs a forward pass to its end, to see what the model makes of what its last layer gives.

        Returns:
            What the last layer gets, as from `caught`, and the first of the model's outputs, its
            logits.

        Raises:
            ValueError: The forward pass never reaches the head.
        """
        seen: list[torch.Tensor] = []

        def follow(hidden: torch.Tensor) -> torch.Tensor:
            seen.append(hidden)
            bias = None if self._bias is None else self._bias.float()
            return nn.functional.linear(hidden.float(), self._weight.float(), bias)

        self._catch.follow = follow
        try:
            logits = forward()[0]
        finally:
            self._catch.follow = None
        if not seen:
            raise ValueError(_NOT_REACHED)
        return seen[0], logits

    def rewards(self, hidden: torch.Tensor) -> torch.Tensor:
        """Applies the last layer in float64, summed half to half, then rounds to float32.

        As one matrix product the rewards would depend on how many rows are computed together,
        since BLAS takes other kernels for other row counts, and so do torch's sums. Adding the
        second half of all rows to their first half, and so on, is element by element.

        Args:
            hidden: `(N, H)`, any floating dtype.

        Returns:
            `(N,)` float32 on the same device.
        """
        products = hidden.double() * self._weight[0].double()
        width = products.shape[1]
        while width > 1:
            half = width // 2
            products[:, :half] += products[:, width - half : width]
            width -= half
        rewards = products[:, 0]
        if self._bias is not None:
            rewards = rewards + self._bias[0].double()
        return rewards.float()

    def scale(self, hidden: torch.Tensor) -> torch.Tensor:
        """How large the rewards of such states could be at most, but for the bias, `(N,)`."""
        largest: torch.Tensor = hidden.float().norm(dim=1) * self._weight.norm()
        return largest


class _Caught(Exception):
    """Ends a forward pass at the head: nobody needs what comes after."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Catch(nn.Module):
    """Stands where the last layer stood, and hands out what it gets.

    Attributes:
        follow: Does what the last layer did, for a forward pass that is to go on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.follow: Callable[[torch.Tensor], torch.Tensor] | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.follow is not None:
            return self.follow(hidden)
        raise _Caught(hidden)


def _last_layer(model: nn.Module, base_prefix: str) -> tuple[str, nn.Linear]:
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == 1
        and is_head(f"{name}.weight", base_prefix)
    ]
    if len(found) != 1:
        raise ModelError(
            f"{type(model).__name__} can't be scored: a reward comes from one linear layer with "
            f"one output, and its head has {len(found)} of them. Use another architecture."
        )
    return found[0]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _roots(model: nn.Module, base_prefix: str) -> list[nn.Module]:
    """The outermost modules that hold nothing but head weights."""
    tops = [
        module
        for name, module in model.named_children()
        if name != base_prefix and any(True for _ in module.parameters())
    ]
    body = getattr(model, base_prefix, None)
    pooler = getattr(body, "pooler", None)
    return [*tops, pooler] if isinstance(pooler, nn.Module) else tops


def _to_float32(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        arg.float() if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg
        for arg in args
    )
