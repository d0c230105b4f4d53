"""What the real PEFT leaves behind: a merged model is scored, everything else is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import make_checkpoint, make_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rayreward import ModelConfig, ModelError, Scorer
from rayreward.types import Reward, Text

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

SETTINGS = [{"seed": 1}, {"seed": 1, "head": "trained"}, {"head": "trained"}, {}]
"""The first is the one that would have a head drawn."""

TEXTS = ["It is fine.", "No.", "A long answer " * 9]


def load(path: Path, **settings: Any) -> Scorer:
    return Scorer.load(ModelConfig(model=str(path), **settings))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "base")


@pytest.fixture
def adapted(base: Path) -> Any:
    """A reward model under LoRA, with adapter and head away from where they start."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    lora = LoraConfig(
        task_type="SEQ_CLS",
        r=4,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["score"],
        init_lora_weights=False,
    )
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.config.pad_token_id = 0
    adapted = get_peft_model(model, lora).eval()
    torch.nn.init.normal_(trained_head(adapted))
    return adapted


def trained_head(adapted: Any) -> torch.nn.Parameter:
    head: torch.nn.Parameter = adapted.base_model.model.score.modules_to_save["default"].weight
    return head


def merge(adapted: Any) -> Any:
    return copy.deepcopy(adapted).merge_and_unload()


def save(model: Any, path: Path) -> Path:
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def write(weights: dict[str, torch.Tensor], like: Path, path: Path) -> Path:
    """Saves tensors as an own script would: beside the config of a reward model."""
    path.mkdir()
    config = json.loads((like / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (path / "config.json").write_text(json.dumps(config))
    own = {name: tensor.detach().clone() for name, tensor in weights.items()}
    save_file(own, path / "model.safetensors", {"format": "pt"})
    make_tokenizer().save_pretrained(path)
    return path


def test_merged_adapter_is_a_trained_model_with_the_adapters_head_and_rewards(
    tmp_path: Path, adapted: Any
) -> None:
    """The head bitwise, the rewards within 1e-5 of the adapter's own forward."""
    scorer = load(save(merge(adapted), tmp_path / "merged"), head="trained")
    assert scorer.fingerprint().head_origin == "trained"
    assert torch.equal(scorer._model.head.tensors["score.weight"], trained_head(adapted))
    outcomes = scorer.score([Text("", text) for text in TEXTS])
    texts = make_tokenizer()([text + "</s>" for text in TEXTS])["input_ids"]
    with torch.no_grad():
        expected = [adapted(input_ids=torch.tensor([ids])).logits.item() for ids in texts]
    rewards = [outcome.value for outcome in outcomes if isinstance(outcome, Reward)]
    assert rewards == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_adapter_without_its_base_is_refused(
    tmp_path: Path, adapted: Any, settings: dict[str, Any]
) -> None:
    path = save(adapted, tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"is a PEFT adapter without its base.*merge_and_unload"):
        load(path, **settings)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("head", [True, False], ids=["trained", "headless"])
def test_adapter_beside_weights_is_refused(
    tmp_path: Path, adapted: Any, head: bool, settings: dict[str, Any]
) -> None:
    """Not applied over the weights, as transformers does where it finds peft."""
    path = make_checkpoint(tmp_path / "both", head=head)
    adapted.save_pretrained(path)
    with pytest.raises(ModelError, match=r"has a PEFT adapter beside its weights"):
        load(path, **settings)


def into_language_model(adapted: Any, base: Path, path: Path) -> Path:
    """Merges the adapter into a causal language model, which has no place for its head."""
    from peft import PeftModel

    adapter = path.with_name("adapter")
    adapted.save_pretrained(adapter)
    model = AutoModelForCausalLM.from_pretrained(base)
    return save(PeftModel.from_pretrained(model, adapter).merge_and_unload(), path)


def body_only(adapted: Any, _base: Path, path: Path) -> Path:
    return save(merge(adapted).base_model, path)


def head_filtered_out(adapted: Any, base: Path, path: Path) -> Path:
    weights = merge(adapted).state_dict()
    del weights["score.weight"]
    return write(weights, base, path)


LOSE_THE_HEAD = [into_language_model, body_only, head_filtered_out]


@pytest.mark.parametrize("export", LOSE_THE_HEAD)
def test_export_that_lost_its_head_is_refused(
    tmp_path: Path, adapted: Any, base: Path, export: Callable[[Any, Path, Path], Path]
) -> None:
    path = export(adapted, base, tmp_path / "export")
    with pytest.raises(ModelError, match=r"has no head\. Pass seed"):
        load(path)
    for seed in (None, 1):
        with pytest.raises(ModelError, match="has no trained head, and head='trained' asks"):
            load(path, head="trained", seed=seed)


@pytest.mark.parametrize("export", LOSE_THE_HEAD)
def test_head_drawn_for_an_export_that_lost_its_own_is_never_called_trained(
    tmp_path: Path, adapted: Any, base: Path, export: Callable[[Any, Path, Path], Path]
) -> None:
    """With a seed it is what it looks like: a language model."""
    scorer = load(export(adapted, base, tmp_path / "export"), seed=1)
    assert scorer.fingerprint().head_origin == "seeded"
    assert not torch.equal(scorer._model.head.tensors["score.weight"], trained_head(adapted))


def as_wrapped(weights: dict[str, Any]) -> dict[str, Any]:
    return weights


def without_prefix(weights: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("base_model.model."): tensor for name, tensor in weights.items()}


def with_body_repaired(weights: dict[str, Any]) -> dict[str, Any]:
    """As without prefix, and the base layers under the names that transformers looks for."""
    return {n.replace(".base_layer", ""): tensor for n, tensor in without_prefix(weights).items()}


def without_lora(weights: dict[str, Any]) -> dict[str, Any]:
    return {n: tensor for n, tensor in with_body_repaired(weights).items() if "lora_" not in n}


def with_the_wrapped_head_only(weights: dict[str, Any]) -> dict[str, Any]:
    return {n: tensor for n, tensor in without_lora(weights).items() if "original" not in n}


def with_the_original_head_only(weights: dict[str, Any]) -> dict[str, Any]:
    return {n: t for n, t in without_lora(weights).items() if "modules_to_save" not in n}


def with_the_adapters_head_name(weights: dict[str, Any]) -> dict[str, Any]:
    """The head named as in adapter_model.safetensors."""
    head = weights["base_model.model.score.modules_to_save.default.weight"]
    body = {n: t for n, t in without_lora(weights).items() if not n.startswith("score.")}
    return {**body, "base_model.model.score.weight": head}


def with_head_repaired_and_lora_left(weights: dict[str, Any]) -> dict[str, Any]:
    head = weights["base_model.model.score.modules_to_save.default.weight"]
    body = {n: t for n, t in with_body_repaired(weights).items() if not n.startswith("score.")}
    return {**body, "score.weight": head}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(
    "rename",
    [
        as_wrapped,
        without_prefix,
        with_body_repaired,
        without_lora,
        with_the_wrapped_head_only,
        with_the_original_head_only,
        with_the_adapters_head_name,
        with_head_repaired_and_lora_left,
    ],
)
def test_weights_saved_while_wrapped_are_refused(
    tmp_path: Path,
    adapted: Any,
    base: Path,
    rename: Callable[[dict[str, Any]], dict[str, Any]],
    settings: dict[str, Any],
) -> None:
    """No head is drawn over the one that is there, and no adapter is left out without a word."""
    path = write(rename(adapted.state_dict()), base, tmp_path / "wrapped")
    with pytest.raises(ModelError, match=r"PEFT adapter that is not merged.*merge_and_unload"):
        load(path, **settings)
