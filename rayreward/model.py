"""A reward model on one device: token ids in, rewards out.

A batch runs in one of three layouts. *Flat*: one stream of tokens without padding, what texts share
once (`rayreward.flat`); where a trial at load finds that it gives what transformers' own forward
gives. *Padded*: transformers' own forward, padded on the right; for everything else.
*Single*: the same for one text after the other, for who would rather wait than see a bit move, and
where padding or a longer neighbour would change what a text gives.
Knows transformers and torch devices; does not know text, files or Ray.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from rayreward.activations import WholeVectorsOfFunctions, keep_whole_vectors
from rayreward.attention import Kernel, on_device
from rayreward.batching import share_prefixes
from rayreward.errors import ModelError
from rayreward.experts import PackedExperts, pack_experts, unpack_experts
from rayreward.flat import Switch, lay_out, run
from rayreward.fusing import (
    Fused,
    fuse_layers,
    gains_together,
    no_layer_left_out,
    unfuse_layers,
)
from rayreward.head import Head, is_head
from rayreward.native import Kernels, find_kernels
from rayreward.packing import PackedLinear, pack_linear_layers, unpack_linear_layers
from rayreward.pooling import find_pooling, pooled
from rayreward.positions import pooled_position, position_padding
from rayreward.sizes import ON_CPU, ON_GPU, Sizes
from rayreward.trial import draw_batch, is_close, tried
from rayreward.types import Branch

_logger = logging.getLogger("rayreward")

HeadOrigin = Literal["trained", "seeded"]
Layout = Literal["flat", "padded", "single"]


@dataclass(frozen=True, slots=True)
class Loaded:
    """What was found while loading."""

    head_origin: HeadOrigin
    dtype: str
    max_positions: int | None
    attention: str


class RewardModel:
    """`reward = W · h_last + b` on one device.

    Attributes:
        device: Where the weights are.
        pad_id: The token that pooling looks past, and that fills a batch up.
        loaded: What was found while loading.
        architecture: The model's class.
        vocabulary: How many token ids there are.
        layout: How batches run.
        pooling: What the states of a text's tokens come to, where the model pools after its head.
        sizes: What numbers of tokens a flat stream is filled up to.
        fused: How layers are compiled (`rayreward.fusing`); null where they are not.
        head: The head, with its weights by name.
    """

    def __init__(
        self, module: PreTrainedModel, pad_id: int, loaded: Loaded, *, fuse: bool = False
    ) -> None:
        self.head = Head(module, module.base_model_prefix)
        self.device = module.device
        self.pad_id = pad_id
        self.loaded = loaded
        self.architecture = type(module).__name__
        self.vocabulary: int = module.config.get_text_config().vocab_size
        self._module = module
        self._switch = Switch(module)
        self._padding_idx = position_padding(module)
        self._causal = True
        self._kernel: Kernel = "blocks"
        self._attentions = 0  # in the last pass
        self._last_attention: int | None = None  # after which the stream is narrowed
        on_cpu = self.device.type == "cpu"
        self._functions = WholeVectorsOfFunctions() if on_cpu else None  # null where none is called
        self.sizes: Sizes = ON_CPU if self.device.type == "cpu" else ON_GPU
        self.fused: Fused | None = None
        batch = self.trial_batch()
        with torch.inference_mode():
            self.pooling, expected = find_pooling(
                self.architecture,
                self.head,
                lambda text: self._forward([text]),
                [branch.ids for branch in batch],
                pad_id,
            )
        self.layout: Layout = self._settle_layout(batch, expected)
        if self._functions is not None and not self._functions.called:
            self._functions = None
        if fuse and self.shares_prefixes:
            self.fused = self._settle_fusing(batch, expected)

    @property
    def attention(self) -> str:
        """What computes attention: a kernel of `rayreward.attention`, or transformers' function."""
        return self._kernel if self.layout == "flat" else self.loaded.attention

    @property
    def shares_prefixes(self) -> bool:
        """Whether what texts have in common runs once.

        Not in an encoder: there a prefix sees what follows it.
        """
        return self.layout == "flat" and self._causal

    @property
    def has_plain_weights(self) -> bool:
        """Whether products take weights in plain order, by kernels that may go by numbers of rows.

        On a CPU those of linear layers are in another order (`rayreward.packing`), save for what a
        head has before its last layer.
        """
        return any(
            parameter.dim() > 1
            for module in self._module.modules()
            if not isinstance(module, nn.Embedding)
            for parameter in module.parameters(recurse=False)
        )

    @property
    def _stands_in_graphs(self) -> bool:
        """Whether attention can be an operator of a graph. On a CPU only our own kernel is one."""
        return self.device.type == "cuda" or self._kernel == "compiled"

    @property
    def worth_sharing(self) -> int:
        """How many tokens texts have to have in common. On a GPU sharing gathers keys anew."""
        return 1 if self.device.type == "cpu" else 8

    def needed(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """The start of a text that its reward comes from, and nothing that follows it.

        What a decoder pools sees no token after itself, such as an EOS that doubles as padding.
        """
        return ids[: pooled_position(ids, self.pad_id) + 1] if self.shares_prefixes else ids

    def trial_batch(self) -> list[Branch]:
        """What this model is tried with."""
        return draw_batch(self.vocabulary, self.loaded.max_positions, self.sizes.multiple)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every live weight and stored buffer of head and body with its name, sorted by name.

        Those that are packed are put into plain order when their turn comes.
        """
        packed = {
            name: module
            for name, module in self._module.named_modules(remove_duplicate=False)
            if isinstance(module, PackedLinear | PackedExperts)
        }
        held = {**self._module.state_dict(), **self.head.tensors}
        plain: dict[str, Callable[[], torch.Tensor]] = {}
        for name, tensor in held.items():
            layer, _, part = name.rpartition(".")
            match packed.get(layer):
                case PackedLinear() as linear:
                    plain[name] = partial(linear.part, part)
                case PackedExperts() as experts:
                    plain[layer] = experts.plain
                case None:
                    plain[name] = tensor.detach
        yield from ((name, plain[name]()) for name in sorted(plain))

    def derived(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The live buffers that no checkpoint stores, such as rotary frequencies, by name."""
        stored = self._module.state_dict().keys()
        buffers = dict(self._module.named_buffers())
        yield from sorted((name, buffers[name]) for name in buffers.keys() - stored)

    @torch.inference_mode()
    def rewards(self, batch: Sequence[Branch]) -> torch.Tensor:
        """Scores one batch, at once if the layout lets it be. Does not wait for a GPU to be done.

        Args:
            batch: N texts.

        Returns:
            `(N,)` float32 on the model's device, in the batch's order. NaN and infinities are
            passed on as they are.
        """
        return self.head.rewards(self.states(batch))

    @torch.inference_mode()
    def states(self, batch: Sequence[Branch]) -> torch.Tensor:
        """What the head's last layer sees of one batch.

        Args:
            batch: N texts.

        Returns:
            `(N, H)` on the model's device, in the batch's order.
        """
        ways = {"flat": self._pooled_flat, "padded": self._pooled_padded, "single": self._own}
        return ways[self.layout](batch)

    def _pooled_flat(self, batch: Sequence[Branch]) -> torch.Tensor:
        """Runs the flat stream; returns what the head's last layer sees, `(N, H)`."""
        stream = lay_out(
            batch,
            self.pad_id,
            self.device,
            kernel=self._kernel,
            causal=self._causal,
            padding_idx=self._padding_idx,
            sizes=self.sizes,
        )
        pooled = [pooled_position(branch.ids, self.pad_id) for branch in batch]
        self._switch.to_streams(in_graphs=self._stands_in_graphs)
        with self._functions or contextlib.nullcontext():
            hidden, self._attentions = run(
                self._module, stream, self.head.caught, pooled, self._last_attention
            )
        return hidden

    def _pooled_padded(self, batch: Sequence[Branch]) -> torch.Tensor:
        """Runs transformers' own forward, padded; returns what the last layer sees, `(N, H)`."""
        texts = [branch.ids for branch in batch]
        hidden = self.head.caught(lambda: self._forward(texts))
        return pooled(hidden, texts, self.pooling, self.pad_id)

    def _forward(self, texts: Sequence[Sequence[int]]) -> Any:
        """Runs transformers' own forward on padded texts, as it would be called by hand."""
        ids, mask = self._padded(texts)
        self._switch.to_own()
        return self._module(input_ids=ids, attention_mask=mask, **self._no_cache())

    def _settle_layout(self, batch: Sequence[Branch], expected: torch.Tensor) -> Layout:
        """Tries what is fastest first, and stays with what gives what transformers' own gives.

        That is its forward pass with the weights as they were loaded, one text at a time. Only a
        trial can tell: some architectures pool in a way of their own, mix tokens outside of
        attention or take weights past their layers, and come out wrong without a word.
        """
        on_cpu = self.device.type == "cpu"
        if on_cpu:
            keep_whole_vectors(self._module)
            prefix = self._module.base_model_prefix
            pack_linear_layers(self._module, lambda name: not is_head(name, prefix))
            pack_experts(self._module)
        if self._finds_kernel(batch, expected):
            return "flat"
        if on_cpu and not is_close(tried(self._own, batch), expected, self._module.dtype):
            unpack_linear_layers(self._module)
            unpack_experts(self._module)
            if self._finds_kernel(batch, expected):
                return "flat"
        if is_close(tried(self._pooled_padded, batch), expected, self._module.dtype):
            return "padded"
        if is_close(tried(self._own, batch), expected, self._module.dtype):
            _logger.warning(
                "padding changes what %s gives, so its texts run one at a time", self.architecture
            )
            return "single"
        raise ModelError(
            f"{self.architecture} can't be scored: by transformers' own forward pass one text does "
            "not get the same reward twice here. Use another architecture, or another dtype."
        )

    def _settle_fusing(self, batch: Sequence[Branch], expected: torch.Tensor) -> Fused | None:
        """Compiles the layers, and stays with that where the stream is right by it, too.

        Together, where that gains something and attention can be an operator; else one by one.
        """
        if self._switch.has_states:
            _logger.warning(
                "the layers of %s are not compiled: some carry a state from token to token",
                self.architecture,
            )
            return None
        could_be_one = self._stands_in_graphs and gains_together(self._module)
        for together in (True, False) if could_be_one else (False,):
            if not fuse_layers(self._module, together=together):
                return None
            reason = self._misses_fused(batch, expected)
            if reason is None:
                return "together" if together else "one by one"
            _logger.info("layers are not compiled together: %s", reason)
            unfuse_layers(self._module)
        _logger.warning("the layers of %s are not compiled: %s", self.architecture, reason)
        self._runs_flat(batch, expected)  # settles anew whether the stream is narrowed
        return None

    @torch.inference_mode()
    def _misses_fused(self, batch: Sequence[Branch], expected: torch.Tensor) -> str | None:
        """Why the stream is not right by compiled layers; null where it is."""
        try:
            with no_layer_left_out():
                self._pooled_flat(batch)
        except Exception as error:  # whatever the compiler lacks on this machine
            return f"{type(error).__name__}: {error}".splitlines()[0]
        return None if self._runs_flat(batch, expected) else "they would give other rewards"

    def _finds_kernel(self, batch: Sequence[Branch], expected: torch.Tensor) -> bool:
        """Whether the stream is right by some kernel, with the weights as they are now held.

        Tries each kernel, for attention as decoders have it and then as encoders do. The tolerance
        has to let bfloat16 pass; what leaks from text to text moves bits when their order is turned
        round.
        """
        for kernel, causal in product(self._kernels(), (True, False)):
            self._kernel, self._causal = kernel, causal
            if self._runs_flat(batch, expected):
                return True
        return False

    @torch.inference_mode()
    def _own(self, batch: Sequence[Branch]) -> torch.Tensor:
        """What reaches the head by transformers' own forward, one text at a time, `(N, H)`."""
        return torch.cat([self._pooled_padded([branch]) for branch in batch]).float()

    def _kernels(self) -> tuple[Kernel, ...]:
        """What could compute attention here, the fastest first."""
        half = self._module.dtype in (torch.bfloat16, torch.float16)
        kernels: list[Kernel] = ["blocks"]
        if self.device.type == "cuda" and half:
            kernels.insert(0, "varlen")
        if self.device.type == "cpu" and isinstance(find_kernels(), Kernels):
            kernels.insert(0, "compiled")
        return tuple(kernels)

    def _runs_flat(self, batch: Sequence[Branch], expected: torch.Tensor) -> bool:
        """Whether the stream is right, in either order; settles whether it is narrowed."""
        turned = share_prefixes([branch.ids for branch in reversed(batch)])
        self._last_attention = None
        ours = tried(self._pooled_flat, batch)
        if ours is None or not is_close(ours, expected, self._module.dtype):
            return False
        for last_attention in (self._attentions, None) if self._causal else (None,):
            self._last_attention = last_attention
            again = tried(self._pooled_flat, turned)
            if again is not None and torch.equal(ours, again.flip(0)):
                return True
        return False

    def _padded(self, batch: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(map(len, batch))
        ids = np.full((len(batch), longest), self.pad_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, sequence in enumerate(batch):
            ids[row, : len(sequence)] = sequence
            mask[row, : len(sequence)] = 1
        return on_device(self.device, ids), on_device(self.device, mask)

    def _no_cache(self) -> dict[str, Any]:
        """Keeps decoders from building a key-value cache that nobody reads."""
        return {"use_cache": False} if hasattr(self._module.config, "use_cache") else {}
