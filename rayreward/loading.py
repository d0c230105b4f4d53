"""From a checkpoint to a reward model: the same bits every time, or a refusal with a remedy.

Knows how transformers loads weights and draws missing ones; does not know how a batch runs.
"""

from __future__ import annotations

import contextlib
import math
import re
import threading
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from rayreward.checkpoint import Checkpoint, check_head_wanted
from rayreward.config import ModelConfig
from rayreward.errors import ConfigError, ModelError
from rayreward.head import is_head, seeded_draws
from rayreward.model import HeadOrigin, Loaded, RewardModel
from rayreward.positions import position_padding

_LOADING = threading.Lock()
"""transformers patches functions of `torch.nn.init` while it loads: one load at a time."""

_THROWAWAY_SEED = 0
"""Feeds draws whose results are refused or never used, so that they don't touch the global RNG."""


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
        config: Its settings; `seed`, `head`, `dtype`, `max_length` and `torch_compile`.
        pad_id: Padding token's id, written into the model's config.
        device: `cpu` or `cuda:0`.

    Raises:
        ModelError: The weights do not fill the body, the head has another number of labels, or
            it has no head and no seed was given.
        ConfigError: `max_length` is more than the model has positions for.
    """
    if checkpoint.is_headless:  # before its weights are read
        check_head_wanted(checkpoint, config, trained=False)
    seed = _THROWAWAY_SEED if config.seed is None else config.seed
    with _LOADING, _quiet(), seeded_draws(seed):
        module, missing = _from_pretrained(checkpoint, config, pad_id)
    origin: HeadOrigin = "seeded" if missing else "trained"
    check_head_wanted(checkpoint, config, trained=not missing)
    module.eval().requires_grad_(False)
    positions = _max_positions(module)
    _check_max_length(checkpoint, config, positions)
    loaded = Loaded(
        head_origin=origin,
        dtype=str(module.dtype).removeprefix("torch."),
        max_positions=positions,
        attention=str(getattr(module.config, "_attn_implementation", "eager")),
    )
    module.to(torch.device(device))
    model = RewardModel(module, pad_id, loaded, fuse=_fuses(module, config))
    if (config.max_length or positions or math.inf) > _one_scale_up_to(module):
        model.layout = "single"
    return model


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
        _refuse_incomplete_head(checkpoint, module, missing)
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
    unused = sorted(name for name in unexpected if checkpoint.shapes.get(name, ())[:1] == (1,))
    if unused:
        raise ModelError(
            f"Model {checkpoint.name!r} has a tensor with one output, {unused[0]}, that its "
            "architecture does not use: probably a trained head under another name. Rename it in "
            "the checkpoint, or remove it to have a head drawn from the seed."
        )


def _refuse_incomplete_head(
    checkpoint: Checkpoint, module: PreTrainedModel, missing: set[str]
) -> None:
    """The rest of a trained head must not be drawn.

    Its last layer, which has one output, tells that there is one. The layers before it may come
    from a language model, as BERT's pooler does.
    """
    stored = sorted(
        name
        for name, tensor in module.named_parameters()
        if name not in missing
        and is_head(name, module.base_model_prefix)
        and tensor.shape[:1] == (1,)
    )
    if stored:
        raise ModelError(
            f"Model {checkpoint.name!r} has part of a trained head: {stored[0]} is stored, "
            f"{min(missing)} is not. RayReward does not draw the rest of a trained head. Save the "
            "whole model again with save_pretrained."
        )


def _fuses(module: PreTrainedModel, config: ModelConfig) -> bool:
    """Whether layers are to be compiled: by default only where that soon pays for its time."""
    if config.torch_compile == "auto":
        return module.device.type == "cuda" and module.dtype in (torch.bfloat16, torch.float16)
    return config.torch_compile


def _max_positions(module: PreTrainedModel) -> int | None:
    """The longest text that the model has positions for; null where it has no such limit."""
    text_config = module.config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    padding = position_padding(module)  # positions are counted from behind it
    return limit if padding is None else limit - padding - 1


def _one_scale_up_to(module: PreTrainedModel) -> float:
    """The longest batch in which all positions are scaled alike; infinite for most models.

    Models with LongRoPE take other frequencies for the whole batch when its longest text is longer
    than that. Source: transformers' modeling_rope_utils.longrope_frequency_update.
    """
    lengths = [math.inf]
    for child in module.modules():
        if "longrope" in str(getattr(child, "rope_type", "")):
            config: Any = child.config
            scaling = str(config.rope_parameters)
            found = re.findall(r"'original_max_position_embeddings': (\d+)", scaling)
            lengths += map(int, found)
    return min(lengths)


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
