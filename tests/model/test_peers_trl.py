"""Parity with the real TRL: the same model, untrained or trained, token ids and rewards."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny import make_checkpoint

from rayreward import ModelConfig, Scorer
from rayreward.hashing import hash_tensors
from rayreward.head import is_head
from rayreward.preferences import check_schema

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

SIDES = ("chosen", "rejected")
ARCHITECTURES = ("llama", "qwen2", "gemma", "gpt2", "bert")

PLAIN = [
    {"prompt": "Is it fine?", "chosen": " It is fine.", "rejected": " No.</s>"},
    {"prompt": "", "chosen": "A long answer " * 9, "rejected": "short"},
]
CONVERSATIONS = [
    {
        "prompt": [{"role": "user", "content": "Is it fine?"}],
        "chosen": [{"role": "assistant", "content": "It is."}],
        "rejected": [{"role": "assistant", "content": "Who knows, " * 5}],
    }
]
PAIRS = [
    {
        "prompt": "Is it? ",
        "chosen": "It is. " * (n + 1),
        "rejected": "No.</s>" + " Bad." * (9 - 2 * n),
    }
    for n in range(6)
]
DIALOGUES = [
    {
        "prompt": [{"role": "user", "content": pair["prompt"]}],
        "chosen": [{"role": "assistant", "content": pair["chosen"]}],
        "rejected": [{"role": "assistant", "content": pair["rejected"]}],
    }
    for pair in PAIRS
]
PAIRS_IN_A_BATCH = 3
"""Divides the rows: of a short last batch accelerate's gather drops what it takes for repeats."""


def trainer(
    path: str,
    rows: list[dict[str, Any]],
    seed: int,
    scratch: Path,
    *,
    dtype: str | None = None,
    lora: Any = None,
) -> Any:
    """The real RewardTrainer, as somebody would make it."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    arguments = RewardConfig(
        output_dir=str(scratch),
        seed=seed,
        use_cpu=True,
        report_to=[],
        bf16=False,
        max_length=None,
        max_steps=3,
        learning_rate=1e-2,
        center_rewards_coefficient=0.1,  # else a bias has no gradient
        disable_tqdm=True,
        per_device_train_batch_size=PAIRS_IN_A_BATCH,
        per_device_eval_batch_size=PAIRS_IN_A_BATCH,
        save_strategy="no",
        model_init_kwargs={"dtype": dtype} if dtype else None,
    )
    data = Dataset.from_list(rows)
    return RewardTrainer(model=path, args=arguments, train_dataset=data, peft_config=lora)


def head_of(theirs: Any) -> dict[str, torch.Tensor]:
    """A copy of the head's weights as they are now."""
    model = theirs.model
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if is_head(name, model.base_model_prefix)
    }


@dataclass(frozen=True)
class Trained:
    """A few real steps of RewardTrainer, and what it saved then."""

    theirs: Any
    drawn: dict[str, torch.Tensor]
    head: dict[str, torch.Tensor]
    saved: str


def train(
    directory: Path, architecture: str, *, dtype: str | None = None, pad: bool = True
) -> Trained:
    path = str(make_checkpoint(directory / "model", architecture, bos=True, pad=pad))
    theirs = trainer(path, PAIRS, 42, directory / "out", dtype=dtype)
    drawn = head_of(theirs)
    theirs.train()
    head = head_of(theirs)
    theirs.save_model(str(directory / "trained"))
    return Trained(theirs, drawn, head, str(directory / "trained"))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("trl"), request.param)


def assert_scores_as_evaluated(theirs: Any, scorer: Scorer, rows: list[dict[str, Any]]) -> None:
    """RewardTrainer's own evaluation, in padded batches: each row, and its metrics, within 1e-5."""
    from datasets import Dataset

    seen: list[Any] = []
    theirs.compute_metrics = lambda prediction: seen.append(prediction.predictions) or {}
    metrics = theirs.evaluate(Dataset.from_list(rows))
    batches = seen[0].reshape(-1, 2, PAIRS_IN_A_BATCH)  # of each batch chosen first, then rejected
    table = pa.Table.from_pylist(rows)
    added = scorer.score_table(table, check_schema(table.schema))
    chosen, rejected = (np.array(added[f"reward_{side}"].to_pylist()) for side in SIDES)
    assert len({*chosen, *rejected}) == 2 * len(rows)
    assert chosen.tolist() == pytest.approx(batches[:, 0].ravel().tolist(), abs=1e-5)
    assert rejected.tolist() == pytest.approx(batches[:, 1].ravel().tolist(), abs=1e-5)
    assert {
        "accuracy": (chosen > rejected).mean(),
        "margin": (chosen - rejected).mean(),
        "mean_reward": (chosen + rejected).mean() / 2,
    } == pytest.approx(
        {name: metrics[f"eval_{name}"] for name in ("accuracy", "margin", "mean_reward")}, abs=1e-5
    )


@pytest.mark.parametrize("seed", [42, 7])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_g1_seeded_model_equals_reward_trainers_bit_for_bit(
    tmp_path: Path, architecture: str, seed: int
) -> None:
    """G1, bitwise: every tensor of head and body, buffers that are not stored among them."""
    path = str(make_checkpoint(tmp_path / "model", architecture))
    model = trainer(path, PLAIN, seed, tmp_path / "out").model
    theirs = {**dict(model.named_buffers()), **model.state_dict()}
    subject = Scorer.load(ModelConfig(model=path, seed=seed, dtype="float32"))._model
    ours = {**dict(subject.tensors()), **dict(subject.derived())}
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("rows", [PLAIN, CONVERSATIONS], ids=["plain", "conversations"])
def test_pairs_are_tokenized_and_scored_as_reward_trainer_does(
    tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    path = str(make_checkpoint(tmp_path / "model", bos=True))
    theirs = trainer(path, rows, 42, tmp_path / "out")
    scorer = Scorer.load(ModelConfig(model=path, seed=42))
    table = pa.Table.from_pylist(rows)
    added = scorer.score_table(table, check_schema(table.schema))
    model = theirs.model.eval()
    for side in SIDES:
        token_ids = theirs.train_dataset[f"{side}_ids"]
        assert added[f"reward_tokens_{side}"].to_pylist() == [len(ids) for ids in token_ids]
        with torch.no_grad():
            expected = [model(torch.tensor([ids])).logits.item() for ids in token_ids]
        assert added[f"reward_{side}"].to_pylist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("rows", [PAIRS, DIALOGUES], ids=["plain", "conversations"])
def test_trained_checkpoint_scores_as_reward_trainers_evaluation_does(
    trained: Trained, rows: list[dict[str, Any]]
) -> None:
    scorer = Scorer.load(ModelConfig(model=trained.saved, head="trained"))
    assert_scores_as_evaluated(trained.theirs, scorer, rows)


@pytest.mark.parametrize("seed", [None, 42])
def test_g1_trained_head_keeps_every_bit_from_reward_trainer_to_scorer(
    trained: Trained, seed: int | None
) -> None:
    """G1, bitwise: the hash of the head before it was saved, whether or not there is a seed."""
    same = [name for name, drawn in trained.drawn.items() if torch.equal(drawn, trained.head[name])]
    assert same == []
    config = ModelConfig(model=trained.saved, head="trained", seed=seed)
    fingerprint = Scorer.load(config).fingerprint()
    assert fingerprint.head_origin == "trained"
    assert fingerprint.head == hash_tensors(trained.head.items())


def test_trained_checkpoint_that_pads_with_eos_scores_as_reward_trainers_evaluation_does(
    tmp_path: Path,
) -> None:
    """TRL takes EOS where there is no padding token, and looks past every EOS at a text's end."""
    trained = train(tmp_path, "llama", pad=False)
    scorer = Scorer.load(ModelConfig(model=trained.saved, head="trained"))
    assert scorer.fingerprint().pad_id == trained.theirs.processing_class.eos_token_id
    assert_scores_as_evaluated(trained.theirs, scorer, PAIRS)


def test_g1_head_trained_in_bfloat16_keeps_its_values(tmp_path: Path) -> None:
    """G1, bitwise: as float32, which holds every bfloat16, beside a body in either precision."""
    trained = train(tmp_path, "llama", dtype="bfloat16")
    half = Scorer.load(ModelConfig(model=trained.saved, head="trained"))
    full = Scorer.load(ModelConfig(model=trained.saved, head="trained", dtype="float32"))
    widened = hash_tensors((name, tensor.float()) for name, tensor in trained.head.items())
    assert half.fingerprint().dtype == "bfloat16"
    assert half.fingerprint().head == full.fingerprint().head == widened
    reopened = trainer(trained.saved, PAIRS, 7, tmp_path / "again")
    assert_scores_as_evaluated(reopened, full, PAIRS)


def test_merged_lora_scores_as_reward_trainers_evaluation_of_the_adapter_does(
    tmp_path: Path,
) -> None:
    from peft import LoraConfig

    path = str(make_checkpoint(tmp_path / "model"))
    lora = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"])
    theirs = trainer(path, PAIRS, 42, tmp_path / "out", lora=lora)
    theirs.train()
    score = theirs.model.base_model.model.score
    head = score.modules_to_save["default"].weight.detach().clone()
    assert not torch.equal(head, score.original_module.weight)
    theirs.processing_class.save_pretrained(tmp_path / "merged")
    copy.deepcopy(theirs.model).merge_and_unload().save_pretrained(tmp_path / "merged")
    scorer = Scorer.load(ModelConfig(model=str(tmp_path / "merged"), head="trained"))
    assert scorer.fingerprint().head == hash_tensors([("score.weight", head)])
    assert_scores_as_evaluated(theirs, scorer, PAIRS)
