"""A reward model on one device: loaded deterministically, token ids in, rewards out.

A batch runs in one of two layouts. *Flat*: one stream of tokens without padding, shared prefixes
once (`rayreward.flat`); for decoders, where a check at load finds that it gives what transformers'
own forward gives. *Padded*: transformers' own forward, padded on the right; for everything else.
Knows transformers and torch devices; does not know text, files or Ray.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from rayreward.checkpoint import Checkpoint
from rayreward.config import ModelConfig
from rayreward.errors import ConfigError, ModelError
from rayreward.flat import hidden_states, lay_out
from rayreward.head import Head, is_head, seeded_draws
from rayreward.types import Group

_LOADING = threading.Lock()
"""transformers patches functions of `torch.nn.init` while it loads: one load at a time."""

_THROWAWAY_SEED = 0
"""Feeds draws whose results are refused or never used, so that they don't touch the global RNG."""

HeadOrigin = Literal["trained", "seeded"]
Layout = Literal["flat", "padded"]

_FLAT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""How far, relative to its length, a hidden state may be from transformers' own: well above what
another order of summation does, well below what attending to the wrong tokens does."""


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
        layout: How batches run.
        head: The head, with its weights by name.
    """

    def __init__(self, module: PreTrainedModel, pad_id: int, loaded: Loaded) -> None:
        self.head = Head(module, module.base_model_prefix)
        self.device = module.device
        self.pad_id = pad_id
        self.loaded = loaded
        self.architecture = type(module).__name__
        self._module = module
        self.layout: Layout = "flat" if self._runs_flat() else "padded"

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every live weight and buffer of head and body with its name, sorted by name."""
        body = dict(self._module.state_dict())
        yield from sorted({**body, **self.head.tensors}.items())

    @torch.inference_mode()
    def rewards(self, batch: Sequence[Group]) -> NDArray[np.float32]:
        """Scores one batch, all of it at once.

        Args:
            batch: Groups with N texts in all, each text of at least one token.

        Returns:
            `(N,)` float32, in the batch's order. NaN and infinities are passed on as they are.
        """
        pooled = self._pooled_flat if self.layout == "flat" else self._pooled_padded
        result: NDArray[np.float32] = self.head.rewards(pooled(batch)).cpu().numpy()
        return result

    def _pooled_flat(self, batch: Sequence[Group]) -> torch.Tensor:
        """Runs the flat stream; returns what the head's last layer sees, `(N, H)`."""
        stream = lay_out(batch, self.pad_id, self.device)
        texts = [text for group in batch for text in group.texts]
        last = [
            int(places[pooled_position(text, self.pad_id)])
            for places, text in zip(stream.texts, texts, strict=True)
        ]
        return hidden_states(self._module, stream)[last]

    def _pooled_padded(self, batch: Sequence[Group]) -> torch.Tensor:
        """Runs transformers' own forward, padded; returns what the last layer sees, `(N, H)`."""
        texts = [text for group in batch for text in group.texts]
        ids, mask = self._padded(texts)
        hidden = self.head.caught(
            lambda: self._module(input_ids=ids, attention_mask=mask, **self._no_cache())
        )
        if hidden.dim() == 2:  # an encoder has pooled already
            return hidden
        last = torch.tensor([pooled_position(text, self.pad_id) for text in texts])
        return hidden[torch.arange(len(texts)), last]

    @torch.inference_mode()
    def _runs_flat(self) -> bool:
        """Whether the flat stream gives what transformers' own forward gives, one text at a time.

        Only a trial can tell: some architectures never call the attention interface, and come out
        wrong without a word.
        """
        if self.device.type != "cpu":
            return False  # not measured on a GPU yet
        groups = _trial_groups(self._module.config.get_text_config(), self.loaded.max_positions)
        own = [self._pooled_padded([Group((), (text,))])[0] for g in groups for text in g.texts]
        try:
            ours = self._pooled_flat(groups)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            return False
        expected = torch.stack(own).float()
        if ours.shape != expected.shape:
            return False
        error = (ours.float() - expected).norm(dim=1) / expected.norm(dim=1)
        return bool((error <= _FLAT_TOLERANCE[self._module.dtype]).all())

    def _padded(self, batch: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(map(len, batch))
        ids = np.full((len(batch), longest), self.pad_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, sequence in enumerate(batch):
            ids[row, : len(sequence)] = sequence
            mask[row, : len(sequence)] = 1
        return torch.from_numpy(ids).to(self.device), torch.from_numpy(mask).to(self.device)

    def _no_cache(self) -> dict[str, Any]:
        """Keeps decoders from building a key-value cache that nobody reads."""
        return {"use_cache": False} if hasattr(self._module.config, "use_cache") else {}


def _trial_groups(text_config: Any, max_positions: int | None) -> list[Group]:
    """Texts of made-up tokens: alone, sharing a prefix, shorter and longer than a block."""
    generator = np.random.default_rng(0)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(generator.integers(0, text_config.vocab_size, length).tolist())

    longest = min(150, max_positions or 150)
    short = longest // 5
    return [
        Group((), (draw(1),)),
        Group(draw(short), (draw(3), draw(longest - short), ())),
        Group((), (draw(longest // 2),)),
        Group(draw(longest // 2), (draw(2), draw(longest // 4))),
    ]


def pooled_position(ids: Sequence[int], pad_id: int) -> int:
    """The position whose hidden state becomes the reward: the rightmost token that is no padding.

    It goes by the id, not by the mask, so a trailing EOS is looked past where it doubles as
    padding. Source: transformers' GenericForSequenceClassification.forward, whose argmax also
    gives 0 for a text of nothing but padding.
    """
    return next((at for at in range(len(ids) - 1, -1, -1) if ids[at] != pad_id), 0)


def load_model(
    checkpoint: Checkpoint, config: ModelConfig, pad_id: int, device: str
) -> RewardModel:
    """Loads a checkpoint as a sequence classifier with one label, the same bits every time.

    The weights are read, and a missing head drawn, on the CPU; then all of it moves to `device`.
    A seeded head equals what `transformers.set_seed(seed)` followed by
    `AutoModelForSequenceClassification.from_pretrained(..., num_labels=1, dtype=float32)` builds
    on a CPU, bit for bit, and so what TRL's RewardTrainer starts from. The process's global RNG
    is left as it was. Safe in several threads at once.

    Args:
        checkpoint: From `open_checkpoint`.
        config: Its settings; `seed`, `head`, `dtype` and `max_length` matter here.
        pad_id: Padding token's id, written into the model's config.
        device: `cpu` or `cuda:0`.

    Raises:
        ModelError: The weights do not fill the body, the head has another number of labels, or
            it has no head and no seed was given.
        ConfigError: `max_length` is more than the model has positions for.
    """
    seed = _THROWAWAY_SEED if config.seed is None else config.seed
    with _LOADING, _quiet(), seeded_draws(seed):
        module, missing = _from_pretrained(checkpoint, config, pad_id)
    origin: HeadOrigin = "seeded" if missing else "trained"
    _check_head_wanted(checkpoint, config, origin)
    module.eval().requires_grad_(False)
    positions = _max_positions(module)
    _check_max_length(checkpoint, config, positions)
    loaded = Loaded(
        head_origin=origin,
        dtype=str(module.dtype).removeprefix("torch."),
        max_positions=positions,
        attention=str(getattr(module.config, "_attn_implementation", "eager")),
    )
    module.to(torch.device(device))  # type: ignore[arg-type]
    return RewardModel(module, pad_id, loaded)


def _from_pretrained(
    checkpoint: Checkpoint, config: ModelConfig, pad_id: int
) -> tuple[PreTrainedModel, set[str]]:
    """Loads on the CPU; returns the model and the head weights that had to be drawn."""
    model_config = AutoConfig.from_pretrained(checkpoint.path, num_labels=1)
    model_config.get_text_config().pad_token_id = pad_id
    model_class = _one_label_class(checkpoint, model_config)
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    try:
        loaded: Any = model_class.from_pretrained(
            checkpoint.path,
            config=model_config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported by us, with a remedy, instead of overridden
            use_safetensors=True,
        )
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"Model {checkpoint.name!r} can't be loaded: {error}") from error
    module, info = loaded
    _refuse_mismatched(checkpoint, module, info["mismatched_keys"])
    missing = set(info["missing_keys"])
    _refuse_missing_body(checkpoint, module, missing)
    if missing:
        _refuse_unused_head(checkpoint, info["unexpected_keys"])
    return module, missing


def _one_label_class(checkpoint: Checkpoint, model_config: Any) -> type[PreTrainedModel]:
    """The architecture's classifier, with a head that is float32 whatever the body is.

    A subclass rather than a cast after loading: a head stored in float32 is never rounded to
    bfloat16 on its way in, and a missing one is drawn in float32.
    """
    try:
        with torch.device("meta"):
            skeleton = AutoModelForSequenceClassification.from_config(model_config)
    except ValueError as error:
        raise ModelError(
            f"Model {checkpoint.name!r} is of type {model_config.model_type!r}, for which "
            "transformers has no sequence classifier. Use an architecture that has one."
        ) from error
    base, prefix = type(skeleton), skeleton.base_model_prefix
    head = sorted(
        name.rpartition(".")[0] for name, _ in skeleton.named_parameters() if is_head(name, prefix)
    )

    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)
        for name in head:
            self.get_submodule(name).float()

    strict = {*(base._keep_in_fp32_modules_strict or ()), *head}
    body = {"__init__": init, "__module__": base.__module__, "_keep_in_fp32_modules_strict": strict}
    return type(base.__name__, (base,), body)


def _refuse_mismatched(checkpoint: Checkpoint, module: PreTrainedModel, mismatched: Any) -> None:
    if not mismatched:
        return
    name, stored, wanted = sorted((key, tuple(a), tuple(b)) for key, a, b in mismatched)[0]
    if is_head(name, module.base_model_prefix):
        raise ModelError(
            f"Model {checkpoint.name!r} has a head of another shape: {name} is {stored}, a reward "
            f"model with one label needs {wanted}. It is a classifier with {stored[0]} labels; "
            "RayReward does not replace a trained head. Train or pass a model with one label."
        )
    raise ModelError(
        f"Model {checkpoint.name!r}: weight {name} is {stored} in the file, but config.json asks "
        f"for {wanted}. The two do not belong together: copy the checkpoint again."
    )


def _refuse_missing_body(
    checkpoint: Checkpoint, module: PreTrainedModel, missing: set[str]
) -> None:
    body = sorted(name for name in missing if not is_head(name, module.base_model_prefix))
    if body:
        raise ModelError(
            f"Model {checkpoint.name!r} lacks {len(body)} weights of its body, such as {body[0]}. "
            "They would be random numbers. Copy the checkpoint again, or check that config.json "
            "belongs to these weights."
        )


def _refuse_unused_head(checkpoint: Checkpoint, unexpected: set[str]) -> None:
    """A head under a name that the architecture does not know must not be replaced by a draw."""
    unused = sorted(name for name in unexpected if checkpoint.shapes.get(name, (0,))[0] == 1)
    if unused:
        raise ModelError(
            f"Model {checkpoint.name!r} has a tensor with one output, {unused[0]}, that its "
            "architecture does not use: probably a trained head under another name. Rename it in "
            "the checkpoint, or remove it to have a head drawn from the seed."
        )


def _check_head_wanted(checkpoint: Checkpoint, config: ModelConfig, origin: HeadOrigin) -> None:
    if origin == "seeded" and config.head == "trained":
        raise ModelError(
            f"Model {checkpoint.name!r} has no trained head, and head='trained' asks for one. "
            "Pass a trained reward model, or head='auto' with a seed for an untrained one."
        )
    if origin == "seeded" and config.seed is None:
        raise ModelError(
            f"Model {checkpoint.name!r} has no head. Pass seed=… (--seed) to have an untrained "
            "one drawn, the same on every actor, or pass a trained reward model."
        )
    if origin == "trained" and config.head == "seeded":
        raise ModelError(
            f"Model {checkpoint.name!r} has a trained head, and head='seeded' asks for a drawn "
            "one. RayReward does not replace a trained head: leave head at 'auto'."
        )


def _max_positions(module: PreTrainedModel) -> int | None:
    """The longest text that the model has positions for; null where it has no such limit."""
    text_config = module.config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    for name, child in module.named_modules():
        if name.endswith("position_embeddings") and isinstance(child, nn.Embedding):
            # RoBERTa and its kin start counting positions behind their padding index
            return limit if child.padding_idx is None else limit - child.padding_idx - 1
    return limit


def _check_max_length(checkpoint: Checkpoint, config: ModelConfig, positions: int | None) -> None:
    if config.max_length is not None and positions is not None and config.max_length > positions:
        raise ConfigError(
            f"max_length={config.max_length} is more than model {checkpoint.name!r} has positions "
            f"for: {positions}. Lower max_length, or leave it out."
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers' load report and bar: what it warns of is checked and told by us."""
    logging = transformers.utils.logging
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
