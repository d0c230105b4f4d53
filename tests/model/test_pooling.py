"""pooling: rewards come of tokens as the model itself makes them, or the model is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, make_checkpoint, make_tokenizer
from transformers import AutoModelForSequenceClassification, BartConfig

from rayreward import ModelConfig, ModelError, Scorer
from rayreward.model import Loaded, RewardModel
from rayreward.types import Branch, Failure, Reward, Status


def classifier(architecture: str) -> Any:
    """transformers' own, with random weights."""
    config = CONFIGS[architecture]()
    config.num_labels = 1
    torch.manual_seed(1)
    return AutoModelForSequenceClassification.from_config(config).eval().requires_grad_(False)


def reward_model(module: Any) -> RewardModel:
    return RewardModel(module, 0, Loaded("seeded", "float32", 256, "sdpa"))


@pytest.mark.parametrize(
    ("architecture", "pooling"), [("llama", "last"), ("bert", "last"), ("eurobert", "mean")]
)
def test_pooling_is_found_by_what_the_model_gives(architecture: str, pooling: str) -> None:
    assert reward_model(classifier(architecture)).pooling == pooling


def test_a_model_that_pools_before_its_head_is_taken_as_it_is() -> None:
    module = classifier("eurobert")
    module.classifier_pooling = "mean"
    assert reward_model(module).pooling == "last"


def test_mean_is_of_a_texts_own_tokens() -> None:
    """Those that pad it do not count, nor do the tokens of its neighbours."""
    module = classifier("eurobert")
    texts = [[5], [7, 8, 9], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]]
    with torch.no_grad():
        expected = [module(input_ids=torch.tensor([text])).logits.item() for text in texts]
    rewards = reward_model(module).rewards([Branch(tuple(text)) for text in texts])
    assert rewards.tolist() == pytest.approx(expected, abs=1e-6)


def test_a_way_of_its_own_is_refused() -> None:
    module = classifier("llama")
    module.register_forward_hook(lambda _module, _args, output: (2 * output.logits + 1,))
    with pytest.raises(ModelError, match="neither from the last token of a text nor from the mean"):
        reward_model(module)


def test_a_model_that_needs_more_than_tokens_is_refused_with_its_reason(tmp_path: Path) -> None:
    """BART makes its reward of the state of an EOS token, of which all texts need as many."""
    shape = {"d_model": 16, "vocab_size": 400, "max_position_embeddings": 64, "num_labels": 1}
    sides = {f"{side}_{of}": 2 for side in ("encoder", "decoder") for of in ("layers", "ffn_dim")}
    heads = {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    config = BartConfig(**shape, **sides, **heads)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"Bart.* ends with ValueError: .*<eos> token\. Use a"):
        Scorer.load(ModelConfig(model=str(tmp_path)), "cpu")


def test_a_head_of_no_layer_with_one_output_is_refused() -> None:
    module = classifier("llama")
    module.score = torch.nn.Linear(32, 2)
    with pytest.raises(ModelError, match="its head has 0 of them"):
        reward_model(module)


@pytest.mark.parametrize(
    "weight", ["model.norm.weight", "score.weight", "model.layers.1.mlp.up_proj.weight"]
)
def test_a_model_that_gives_no_numbers_is_loaded_and_its_texts_get_a_reason(
    tmp_path: Path, weight: str
) -> None:
    """As float16 does where it overflows, for all texts of the trial or for some."""
    path = make_checkpoint(tmp_path, head=True)
    weights = load_file(path / "model.safetensors")
    weights[weight].fill_(float("nan"))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    (outcome,) = Scorer.load(ModelConfig(model=str(path)), "cpu").score(["a text"])
    assert isinstance(outcome, Failure)
    assert outcome.status is Status.NOT_FINITE


def test_a_text_of_the_trial_that_gives_no_number_says_nothing(tmp_path: Path) -> None:
    """As of tokens that no training has seen: the others get their rewards."""
    path = make_checkpoint(tmp_path, head=True)
    (expected,) = Scorer.load(ModelConfig(model=str(path)), "cpu").score(["a text"])
    assert isinstance(expected, Reward)
    weights = load_file(path / "model.safetensors")
    model = Scorer.load(ModelConfig(model=str(path)), "cpu")._model
    weights["model.embed_tokens.weight"][list(model.trial_batch()[2].ids[-1:])] = float("nan")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    (outcome,) = Scorer.load(ModelConfig(model=str(path)), "cpu").score(["a text"])
    assert isinstance(outcome, Reward)
    assert outcome.value == pytest.approx(expected.value, abs=1e-6)
