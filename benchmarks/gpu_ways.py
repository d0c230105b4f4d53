"""The ways to score a workload that the GPU benchmark compares: RayReward's, and a loop (`gpu`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from common import stream_tokens
from gpu_workloads import PAD_ID, Scale, Texts
from transformers import PreTrainedModel

from rayreward.attention import Kernel
from rayreward.batching import make_batches, pack_branches, share_prefixes
from rayreward.fusing import Fused, fuse_layers, gains_together, unfuse_layers
from rayreward.model import Layout, RewardModel
from rayreward.sizes import Sizes
from rayreward.types import Branch

SORTED = "sorted by length"
Rewards = list[float]


@dataclass(frozen=True, slots=True)
class Batch:
    branches: list[Branch]
    texts: list[int]
    """Which texts of the workload these are, in order."""


@dataclass(frozen=True, slots=True)
class Form:
    """A way for RayReward to run a batch."""

    layout: Layout
    kernel: Kernel | None = None
    """What computes attention in a flat stream."""
    compiled: Fused | None = None

    def __str__(self) -> str:
        parts = [self.layout, *([f"by {self.kernel}"] if self.kernel else [])]
        return " ".join([*parts, *([f"compiled {self.compiled}"] if self.compiled else [])])

    def take(self, model: RewardModel) -> None:
        """Makes the model run so, whether it would by itself or not."""
        model.layout = self.layout
        if self.kernel is not None:
            model._kernel, model._causal = self.kernel, True
        unfuse_layers(model._module)
        if self.compiled:
            fuse_layers(model._module, together=self.compiled == "together")


def forms_of(model: RewardModel) -> list[Form]:
    """All forms that are measured, the padded one last."""
    others = [Form("flat", "blocks"), Form("padded")]
    if model.device.type == "cpu":
        return others
    compiled = [Form("flat", "varlen", "one by one"), Form("flat", "varlen")]
    if gains_together(model._module):
        compiled.insert(0, Form("flat", "varlen", "together"))
    return compiled + others


@dataclass(frozen=True, slots=True)
class Way:
    name: str
    batches: list[Batch]
    prepare: Callable[[], None]
    """What comes before a pass."""
    score: Callable[[list[Branch]], torch.Tensor]
    form: Form | None = None
    """None: transformers' own."""
    sizes: Sizes | None = None
    """What a flat stream's tokens are filled up to. None: batches are padded."""
    narrowed: bool = False
    """Whether only pooled tokens go on after the last attention."""

    def run(self) -> Rewards:
        """Scores the workload; its rewards in the order of its texts.

        As in `Scorer`, a batch is begun before the one before it is read.
        """
        found: dict[int, float] = {}
        begun: tuple[Batch, torch.Tensor] | None = None
        for batch in [*self.batches, None]:
            now = None if batch is None else (batch, self.score(batch.branches))
            if begun is not None:
                found.update(zip(begun[0].texts, begun[1].tolist(), strict=True))
            begun = now
        return [found[text] for text in sorted(found)]

    @property
    def tokens(self) -> int:
        """Tokens that run."""
        if self.sizes is None:
            return sum(rows * longest for rows, longest in self._padded())
        return sum(stream_tokens(batch.branches, self.sizes) for batch in self.batches)

    @property
    def ended(self) -> int:
        """Tokens that run no further than the last attention."""
        if self.sizes is None or not self.narrowed:
            return 0
        return self.tokens - sum(self.sizes.filled(len(batch.texts)) for batch in self.batches)

    @property
    def seen(self) -> int:
        """(query, key) pairs of tokens that run; a token sees itself and those before it."""
        if self.sizes is None:
            return sum(rows * triangle(longest) for rows, longest in self._padded())
        branches = (branch for batch in self.batches for branch in batch.branches)
        return sum(triangle(len(branch.ids)) - triangle(branch.shared) for branch in branches)

    def _padded(self) -> Iterator[tuple[int, int]]:
        for batch in self.batches:
            lengths = [len(branch.ids) for branch in batch.branches]
            yield len(lengths), max(lengths)


def triangle(side: int) -> int:
    return side * (side + 1) // 2


def make_ways(
    model: RewardModel, plain: PreTrainedModel, texts: Texts, scale: Scale, taken: Form
) -> list[Way]:
    """Every way to score a workload; of the flat forms, the one that is taken in all its sizes."""
    lengths = [len(text) for text in texts]
    budget, size = scale.middle
    *streams, padded = forms_of(model)
    first, *others = sorted(streams, key=lambda form: form != taken)

    def ours(form: Form, how: str, batches: list[Batch], budget: int) -> Way:
        name = f"RayReward {form}, {how}, {budget:,} tokens"
        sizes = None if form.layout == "padded" else model.sizes
        narrowed = model._last_attention is not None
        return Way(name, batches, lambda: form.take(model), model.rewards, form, sizes, narrowed)

    def pack(some: int, *, share: bool) -> list[Batch]:
        """Batches as `Scorer` makes them for a flat stream."""
        if not share:
            return number(pack_branches([Branch(text) for text in texts], some), range(len(texts)))
        order = sorted(range(len(texts)), key=texts.__getitem__)
        branches = share_prefixes([texts[index] for index in order], model.worth_sharing)
        return number(pack_branches(branches, some), order)

    def loop(name: str, order: Sequence[int], size: int) -> Way:
        batches = [list(order[start : start + size]) for start in range(0, len(order), size)]
        name = f"transformers, {name}, batches of {size}"
        return Way(
            name,
            pick(texts, batches),
            lambda: unfuse_layers(plain),
            lambda batch: forward(plain, batch),
        )

    by_length = sorted(range(len(texts)), key=lengths.__getitem__)
    return without_repetitions(
        [
            *(ours(first, "shared", pack(some, share=True), some) for some in scale.budgets),
            *(ours(first, "unshared", pack(some, share=False), some) for some in scale.budgets),
            *(ours(form, "shared", pack(budget, share=True), budget) for form in others),
            ours(padded, "sorted", pick(texts, make_batches(lengths, budget)), budget),
            *(loop(SORTED, by_length, some) for some in scale.sizes),
            loop("file order", range(len(texts)), size),
        ]
    )


def without_repetitions(ways: Sequence[Way]) -> list[Way]:
    kept: list[Way] = []
    for way in ways:
        if not any((way.form, way.batches) == (other.form, other.batches) for other in kept):
            kept.append(way)
    return kept


def number(batches: Sequence[list[Branch]], order: Sequence[int]) -> list[Batch]:
    """Batches that hold a workload's texts in some order."""
    texts = iter(order)
    return [Batch(batch, list(islice(texts, len(batch)))) for batch in batches]


def pick(texts: Texts, batches: Sequence[list[int]]) -> list[Batch]:
    return [Batch([Branch(texts[index]) for index in chosen], chosen) for chosen in batches]


@torch.inference_mode()
def forward(plain: PreTrainedModel, batch: Sequence[Branch]) -> torch.Tensor:
    """The forward of transformers itself over a batch that is padded on the right; waits for it."""
    rows = [torch.tensor(branch.ids) for branch in batch]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD_ID)
    ids = ids.to(plain.device)
    mask = (ids != PAD_ID).long()
    return plain(input_ids=ids, attention_mask=mask).logits[:, 0].float().cpu()
