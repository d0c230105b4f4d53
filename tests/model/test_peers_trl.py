"""Parity with the real TRL: the same untrained model, the same token ids, the same rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from tiny import make_checkpoint

from rayreward import ModelConfig, Scorer
from rayreward.preferences import check_schema

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

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


def trainer(path: str, rows: list[dict[str, Any]], seed: int, scratch: Path) -> Any:
    """The real RewardTrainer, as somebody would make it."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    arguments = RewardConfig(
        output_dir=str(scratch), seed=seed, use_cpu=True, report_to=[], bf16=False, max_length=None
    )
    return RewardTrainer(model=path, args=arguments, train_dataset=Dataset.from_list(rows))


@pytest.mark.parametrize("seed", [42, 7])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_g1_seeded_model_equals_reward_trainers_bit_for_bit(
    tmp_path: Path, architecture: str, seed: int
) -> None:
    """G1, bitwise: every tensor of head and body."""
    path = str(make_checkpoint(tmp_path / "model", architecture))
    theirs = trainer(path, PLAIN, seed, tmp_path / "out").model.state_dict()
    ours = dict(Scorer.load(ModelConfig(model=path, seed=seed, dtype="float32"))._model.tensors())
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
    for side in ("chosen", "rejected"):
        token_ids = theirs.train_dataset[f"{side}_ids"]
        assert added[f"reward_tokens_{side}"].to_pylist() == [len(ids) for ids in token_ids]
        with torch.no_grad():
            expected = [model(torch.tensor([ids])).logits.item() for ids in token_ids]
        assert added[f"reward_{side}"].to_pylist() == pytest.approx(expected, abs=1e-5)
