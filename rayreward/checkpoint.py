"""Where a checkpoint lies and whether it may be loaded, told from its files alone.

Everything that can be refused without building the model is refused here, with what to do about
it. Knows the layout of Hugging Face checkpoints; does not know torch or Ray.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rayreward.config import ModelConfig
from rayreward.errors import ModelError

_HUB_FILES = [
    "*.json",
    "*.safetensors",
    "*.model",
    "*.jinja",
    "merges.txt",
    "vocab.txt",
    "*.tiktoken",
]
"""What is fetched from the hub: never pickled weights, never code."""

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5")

_LANGUAGE_MODEL = re.compile(r"(ForCausalLM|ForMaskedLM|LMHeadModel)$")
"""How the architectures end that have no head of a classifier."""

_OF_PEFT = re.compile(
    r"^base_model\.model\.|(^|\.)(lora_\w+|base_layer|modules_to_save|original_module)(\.|$)"
)
"""How PEFT names the tensors of a model it has wrapped. No model of transformers has these."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on this machine's disk."""

    name: str
    """What the user called it."""

    path: Path
    revision: str | None
    """The commit that a hub id resolved to; null for a local directory."""

    config: dict[str, Any]
    """Its `config.json`."""

    shapes: dict[str, tuple[int, ...]]
    """Shape of every stored tensor by its stored name."""

    @property
    def is_headless(self) -> bool:
        """Whether its files leave no doubt that it has no head: a language model, no layer of
        which has one output. Where they do, only the built model tells.
        """
        built_as = self.config.get("architectures") or [""]
        has_one = any(len(shape) == 2 and shape[0] == 1 for shape in self.shapes.values())
        return bool(_LANGUAGE_MODEL.search(str(built_as[0]))) and not has_one

    @property
    def pad_id(self) -> int | None:
        """The config's `pad_token_id`, class defaults included."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.path).get_text_config()
        return getattr(config, "pad_token_id", None)


def open_checkpoint(model: str, revision: str | None = None) -> Checkpoint:
    """Finds a checkpoint and reads what its files say about it.

    Args:
        model: A directory, or an id on the Hugging Face hub (which is then downloaded).
        revision: Branch, tag or commit of a hub id.

    Raises:
        ModelError: There is no such checkpoint, or it may not be loaded: only pickled weights,
            remote code, an adapter that is not merged into its base model.
    """
    path, commit = _locate(model, revision)
    _refuse_adapter(model, path)
    config = _read_json(path / "config.json") if (path / "config.json").exists() else None
    if config is None:
        raise ModelError(_no_config(model, path))
    _refuse_remote_code(model, config)
    shapes = _read_shapes(model, path)
    _refuse_unmerged(model, shapes)
    return Checkpoint(model, path, commit, config, shapes)


def at_hand(model: ModelConfig) -> ModelConfig:
    """The settings with a path that is good in every directory, its files looked at.

    So what they tell is told before anything starts. An id on the hub stays as it is.

    Raises:
        ModelError: There is no such checkpoint, or it may not be loaded.
    """
    directory = local_directory(model.model)
    if directory is None:
        return model
    checkpoint = open_checkpoint(str(directory))
    if checkpoint.is_headless:
        check_head_wanted(checkpoint, model, trained=False)
    return replace(model, model=str(directory))


def check_head_wanted(checkpoint: Checkpoint, config: ModelConfig, *, trained: bool) -> None:
    """Refuses a head that was not asked for, and the lack of one that was.

    Args:
        checkpoint: What the head is of.
        config: Its settings; `head` and `seed`.
        trained: Whether the checkpoint has one.

    Raises:
        ModelError: So it is.
    """
    if not trained and config.head == "trained":
        raise ModelError(
            f"Model {checkpoint.name!r} has no trained head, and head='trained' asks for one. "
            "Pass a trained reward model, or head='auto' with a seed for an untrained one."
        )
    if not trained and config.seed is None:
        raise ModelError(
            f"Model {checkpoint.name!r} has no head. Pass seed=… (--seed) to have an untrained "
            "one drawn, the same on every actor, or pass a trained reward model."
        )
    if trained and config.head == "seeded":
        raise ModelError(
            f"Model {checkpoint.name!r} has a trained head, and head='seeded' asks for a drawn "
            "one. RayReward does not replace a trained head: leave head at 'auto'."
        )


def local_directory(model: str) -> Path | None:
    """The absolute directory that `model` names, or null if it is an id on the hub.

    Raises:
        ModelError: It names a path at which there is no directory.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise ModelError(
            f"Model {model!r} is a file. Pass the directory that holds config.json and the "
            "*.safetensors files."
        )
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise ModelError(
            f"Model directory {model!r} does not exist. Pass a directory with config.json and "
            "*.safetensors files, or an id on the Hugging Face hub such as 'org/name'."
        )
    return None


def _locate(model: str, revision: str | None) -> tuple[Path, str | None]:
    directory = local_directory(model)
    return (directory, None) if directory is not None else _download(model, revision)


def _download(model: str, revision: str | None) -> tuple[Path, str | None]:
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(model, revision=revision, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub client raises a dozen kinds, all meaning "not to be had"
        raise ModelError(
            f"Model {model!r} is no directory in {Path.cwd()}, and not to be had from the Hugging "
            f"Face hub ({type(error).__name__}: {_first_line(error)}). Check the name and the "
            "network, or pass a directory."
        ) from error
    return path, path.name  # a snapshot's folder is named by its commit


def _no_config(model: str, path: Path) -> str:
    return (
        f"Model {model!r} is no checkpoint: {path} has no config.json. Pass a directory that "
        "save_pretrained wrote."
    )


def _refuse_adapter(model: str, path: Path) -> None:
    """Refuses an adapter's directory, even one that has the base model in it.

    Where peft is installed, transformers applies an adapter that lies beside the weights; where it
    is not, it leaves it out. The same directory would be two models. Source: maybe_load_adapters
    in transformers/integrations/peft.py.
    """
    if not (path / "adapter_config.json").exists():
        return
    if not (path / "config.json").exists():
        raise ModelError(
            f"Model {model!r} is a PEFT adapter without its base model. Merge it into the base "
            "(PeftModel.merge_and_unload), save the result with save_pretrained and pass that."
        )
    raise ModelError(
        f"Model {model!r} has a PEFT adapter beside its weights (adapter_config.json). Merge it "
        "into the base (PeftModel.merge_and_unload), save the result with save_pretrained in a "
        "directory of its own and pass that. If these weights are merged already, remove the "
        "adapter's files."
    )


def _refuse_unmerged(model: str, names: Iterable[str]) -> None:
    """Refuses weights saved while PEFT had them wrapped: what it added would be left out."""
    wrapped = sorted(name for name in names if _OF_PEFT.search(name))
    if wrapped:
        raise ModelError(
            f"Model {model!r} has tensors of a PEFT adapter that is not merged, such as "
            f"{wrapped[0]}. Merge it into the base (PeftModel.merge_and_unload), save the result "
            "with save_pretrained and pass that."
        )


def _refuse_remote_code(model: str, config: dict[str, Any]) -> None:
    auto_map = config.get("auto_map", {})
    known = _is_known(config.get("model_type"))
    if "AutoModelForSequenceClassification" in auto_map or (auto_map and not known):
        raise ModelError(
            f"Model {model!r} wants to run code of its own (auto_map in its config.json), which "
            "RayReward never does: code from a checkpoint could do anything on every machine of "
            "the cluster. Convert it to an architecture that transformers has, and save that."
        )
    if not known:
        raise ModelError(
            f"Model {model!r} is of type {config.get('model_type')!r}, which the installed "
            "transformers does not know. Upgrade transformers, or check config.json."
        )


def _is_known(model_type: object) -> bool:
    """Whether transformers has the architecture; without torch, for which a driver has no use."""
    with contextlib.suppress(ImportError):  # transformers' own module: it holds the names alone
        from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES

        if model_type in CONFIG_MAPPING_NAMES:
            return True
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def _read_shapes(model: str, path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for file in _weight_files(model, path):
        try:
            with safe_open(file, framework="np") as tensors:
                for key in tensors.keys():  # noqa: SIM118  # a handle, not a dict
                    shapes[key] = tuple(tensors.get_slice(key).get_shape())
        except Exception as error:
            raise ModelError(
                f"Weights file {file} can't be read ({_first_line(error)}). It may be cut off: "
                "copy or download it again."
            ) from error
    return shapes


def _weight_files(model: str, path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(_read_json(index)["weight_map"].values()))
        missing = [name for name in names if not (path / name).exists()]
        if missing:
            raise ModelError(
                f"Model {model!r} lacks {len(missing)} of its {len(names)} weights files, the "
                f"first is {missing[0]}. Copy or download it again."
            )
        return [path / name for name in names]
    if (path / "model.safetensors").exists():
        return [path / "model.safetensors"]
    if any(file for pattern in _PICKLED for file in path.glob(pattern)):
        raise ModelError(
            f"Model {model!r} has pickled weights only, and unpickling runs code. Load it once "
            "where you trust it and save it again with save_pretrained, which writes safetensors."
        )
    raise ModelError(f"Model {model!r} has no weights: {path} holds no model.safetensors.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read as JSON ({error}). Copy it again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is not a JSON object. Copy it again.")
    return content


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
