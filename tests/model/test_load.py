"""Loading: the same bits every time, and everything refused that would not be a reward model."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, make_checkpoint
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, set_seed

from rayreward import ConfigError, ModelConfig, ModelError, loading
from rayreward.checkpoint import open_checkpoint
from rayreward.hashing import hash_tensors
from rayreward.loading import load_model
from rayreward.model import RewardModel
from rayreward.types import Branch


def load(path: Path, pad_id: int = 0, **settings: Any) -> RewardModel:
    config = ModelConfig(model=str(path), **settings)
    return load_model(open_checkpoint(config.model), config, pad_id, "cpu")


def singles(texts: list[list[int]]) -> list[Branch]:
    """Texts that share nothing."""
    return [Branch(tuple(text)) for text in texts]


def reference(path: Path, seed: int) -> Any:
    """What transformers builds, and what TRL's RewardTrainer starts from."""
    state = torch.get_rng_state()
    set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=1, dtype=torch.float32
    )
    torch.set_rng_state(state)
    return model.eval()


@pytest.mark.parametrize("seed", [7, 42])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_seeded_head_equals_transformers_bit_for_bit(
    tmp_path: Path, architecture: str, seed: int
) -> None:
    """G1: every tensor, head and body, buffers that are not stored among them."""
    path = make_checkpoint(tmp_path, architecture)
    theirs = reference(path, seed)
    expected = {**dict(theirs.named_buffers()), **theirs.state_dict()}
    model = load(path, seed=seed)
    loaded = {**dict(model.tensors()), **dict(model.derived())}
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_rewards_agree_with_transformers_one_row_at_a_time(
    tmp_path: Path, architecture: str
) -> None:
    path = make_checkpoint(tmp_path, architecture)
    model, expected = load(path, seed=42), reference(path, 42)
    expected.config.pad_token_id = 0
    batch = [[5, 6, 7], [9] * 40, [11], [4, 0, 8, 0], [3, 9, 27, 81, 243]]
    with torch.no_grad():
        rows = [expected(input_ids=torch.tensor([row])).logits.item() for row in batch]
    assert model.rewards(singles(batch)).tolist() == pytest.approx(rows, abs=1e-5)
    assert model.rewards(singles(batch)).dtype is torch.float32


def test_load_leaves_the_global_rng_alone(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "bert")
    before = torch.get_rng_state()
    load(path, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_load_does_not_depend_on_the_global_rng(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    heads = []
    for state in (1, 2):
        torch.manual_seed(state)
        heads.append(hash_tensors(load(path, seed=5).head.tensors.items()))
    assert heads[0] == heads[1]


def test_load_in_two_threads_at_once_gives_each_its_own_head(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    expected = {seed: hash_tensors(load(path, seed=seed).head.tensors.items()) for seed in (1, 2)}
    found: dict[int, list[str]] = {1: [], 2: []}
    barrier = threading.Barrier(2)

    def work(seed: int) -> None:
        for _ in range(5):
            barrier.wait(30)
            found[seed].append(hash_tensors(load(path, seed=seed).head.tensors.items()))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {seed: [digest] * 5 for seed, digest in expected.items()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_head_is_float32_whatever_the_body_is(tmp_path: Path, dtype: str) -> None:
    path = make_checkpoint(tmp_path, "bert")
    full, half = load(path, seed=3), load(path, seed=3, dtype=dtype)
    assert half.loaded.dtype == dtype
    assert all(torch.equal(half.head.tensors[name], t) for name, t in full.head.tensors.items())


def test_trained_float32_head_is_not_rounded_by_a_bfloat16_body(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, head=True)
    stored = load_file(path / "model.safetensors")["score.weight"]
    assert not torch.equal(stored, stored.bfloat16().float())
    assert torch.equal(load(path, dtype="bfloat16").head.tensors["score.weight"], stored)


def test_dtype_auto_takes_the_checkpoints_own(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, dtype=torch.bfloat16)
    assert load(path, seed=1).loaded.dtype == "bfloat16"


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_trained_head_is_loaded_and_never_drawn(tmp_path: Path, seed: int | None) -> None:
    path = make_checkpoint(tmp_path, head=True)
    model = load(path, seed=seed)
    stored = load_file(path / "model.safetensors")["score.weight"]
    assert model.loaded.head_origin == "trained"
    assert torch.equal(model.head.tensors["score.weight"], stored)


def test_sharded_weights_give_the_same_model(tmp_path: Path) -> None:
    whole = make_checkpoint(tmp_path / "whole")
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(
        tmp_path / "parts", max_shard_size="50KB"
    )
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    parts = load(tmp_path / "parts", seed=1).tensors()
    assert hash_tensors(parts) == hash_tensors(load(whole, seed=1).tensors())


@pytest.mark.parametrize("built_as", ["LlamaForCausalLM", "LlamaModel"])
def test_missing_head_without_a_seed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built_as: str
) -> None:
    """Before the weights of a language model are read, which is what lacks it most often."""
    path = make_checkpoint(tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "architectures": [built_as]}))
    read = []
    from_pretrained = loading._from_pretrained
    monkeypatch.setattr(
        loading, "_from_pretrained", lambda *a: read.append(1) or from_pretrained(*a)
    )
    with pytest.raises(ModelError, match="has no head. Pass seed"):
        load(path)
    assert bool(read) is (built_as == "LlamaModel")


def test_language_model_with_a_layer_of_one_output_may_have_a_head(tmp_path: Path) -> None:
    """A trained head under a language model's name is found, and used."""
    path = make_checkpoint(tmp_path, head=True)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    assert load(path).loaded.head_origin == "trained"


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("architecture", ["llama", "bert", "roberta"])
def test_head_trained_refuses_a_checkpoint_without_one(
    tmp_path: Path, architecture: str, seed: int | None
) -> None:
    with pytest.raises(ModelError, match="no trained head, and head='trained' asks for one"):
        load(make_checkpoint(tmp_path, architecture), seed=seed, head="trained")


def test_head_seeded_refuses_a_trained_one(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not replace a trained head"):
        load(make_checkpoint(tmp_path, head=True), seed=1, head="seeded")


@pytest.mark.parametrize("settings", [{}, {"seed": 1}, {"head": "trained"}], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "bert", "roberta"])
def test_reward_model_saved_again_with_two_labels_is_refused(
    tmp_path: Path, architecture: str, settings: dict[str, Any]
) -> None:
    path = make_checkpoint(tmp_path, architecture, head=True)
    assert load(path).loaded.head_origin == "trained"
    AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=2, ignore_mismatched_sizes=True
    ).save_pretrained(path)
    with pytest.raises(
        ModelError, match=r"is \(2,.*one label needs \(1,.*classifier with 2 labels"
    ):
        load(path, **settings)


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize(
    ("architecture", "lost"),
    [
        ("bert", "classifier.bias"),
        ("bert", "classifier.weight"),
        ("bert", "bert.pooler.dense.weight"),
        ("roberta", "classifier.dense.weight"),
        ("roberta", "classifier.out_proj.weight"),
    ],
)
def test_trained_head_that_lost_a_part_is_refused(
    tmp_path: Path, architecture: str, lost: str, seed: int | None
) -> None:
    path = make_checkpoint(tmp_path, architecture, head=True)
    weights = load_file(path / "model.safetensors")
    del weights[lost]
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=rf"part of a trained head: .*, {re.escape(lost)} is not"):
        load(path, seed=seed)


def test_pooler_of_a_language_model_is_kept_where_the_rest_of_the_head_is_drawn(
    tmp_path: Path,
) -> None:
    path = make_checkpoint(tmp_path, "bert", head=True)
    weights = load_file(path / "model.safetensors")
    del weights["classifier.weight"], weights["classifier.bias"]
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    model = load(path, seed=1)
    assert model.loaded.head_origin == "seeded"
    pooler = "bert.pooler.dense.weight"
    assert torch.equal(model.head.tensors[pooler], weights[pooler])


def test_unused_number_does_not_keep_a_model_from_loading(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    weights = load_file(path / "model.safetensors")
    weights["logit_scale"] = torch.tensor(1.0)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    assert load(path, seed=1).loaded.head_origin == "seeded"


def test_missing_body_weights_are_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights of its body.*up_proj"):
        load(path, seed=1)


def test_head_under_another_name_is_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    weights = load_file(path / "model.safetensors")
    weights["v_head.summary.weight"] = torch.ones(1, 32)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"v_head\.summary\.weight.*another name"):
        load(path, seed=1)


def test_max_length_above_the_positions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_length=257 .* positions for: 256"):
        load(make_checkpoint(tmp_path), seed=1, max_length=257)


def test_positions_of_roberta_start_behind_its_padding(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "roberta")
    assert load(path, seed=1).loaded.max_positions == 255


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights only"):
        load(path, seed=1)


def test_remote_code_is_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="run code of its own"):
        load(path, seed=1)


def test_native_architecture_with_leftover_auto_map_is_loaded_natively(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    (path / "config.json").write_text(json.dumps(config))
    assert load(path, seed=1).architecture == "LlamaForSequenceClassification"


def test_unknown_model_type_is_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    (path / "config.json").write_text(json.dumps({"model_type": "nonesuch"}))
    with pytest.raises(ModelError, match="'nonesuch', which the installed"):
        load(path, seed=1)


def test_adapter_without_its_base_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="is a PEFT adapter without its base"):
        load(tmp_path, seed=1)


@pytest.mark.parametrize("head", [True, False])
def test_adapter_beside_weights_is_refused(tmp_path: Path, head: bool) -> None:
    path = make_checkpoint(tmp_path, head=head)
    (path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="has a PEFT adapter beside its weights"):
        load(path, seed=1)


def test_directory_without_a_config_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no checkpoint"):
        load(tmp_path, seed=1)


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        load(tmp_path / "nowhere", seed=1)


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="can't be read"):
        load(path, seed=1)


def test_checkpoint_lacking_a_weights_file_is_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    (path / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lacks 1 of its 1 weights files"):
        load(path, seed=1)
