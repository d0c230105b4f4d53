"""Rows in, rewards out, in one process: order, failures, and agreement with transformers."""

from __future__ import annotations

import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from tiny import flip_one_bit, make_checkpoint
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from rayreward import ConfigError, DataError, ModelConfig, ModelError, Scorer
from rayreward.meter import ModelTime
from rayreward.preferences import check_schema
from rayreward.types import Conversation, Failure, Reward, Status, Text

TEXTS = [f"Answer {n}: " + "the weather is fine. " * (n % 7) for n in range(20)]


@pytest.fixture(scope="module")
def scorer(tiny_model: str) -> Scorer:
    return Scorer.load(ModelConfig(model=tiny_model, seed=42, max_batch_tokens=256))


@pytest.mark.parametrize("device", ["mps", "gpu", "cuda:99"])
def test_a_device_that_is_not_here_is_refused(tiny_model: str, device: str) -> None:
    with pytest.raises(ConfigError, match=f"device='{device}' is not here. Pass 'auto', or one"):
        Scorer.load(ModelConfig(model=tiny_model, seed=42), device)


def test_a_path_is_no_config(tiny_model: str) -> None:
    with pytest.raises(ConfigError, match=r"got a str\. Pass ModelConfig\(model="):
        Scorer.load(tiny_model)  # type: ignore[arg-type]


def values(outcomes: Any) -> list[float]:
    assert all(isinstance(outcome, Reward) for outcome in outcomes)
    return [outcome.value for outcome in outcomes]


def test_score_agrees_with_transformers_one_row_at_a_time(scorer: Scorer, tiny_model: str) -> None:
    set_seed(42)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1).eval()
    hf = AutoTokenizer.from_pretrained(tiny_model)
    with torch.no_grad():
        expected = [model(**hf(text + "</s>", return_tensors="pt")).logits.item() for text in TEXTS]
    assert values(scorer.score([Text("", text) for text in TEXTS])) == pytest.approx(
        expected, abs=1e-5
    )


def test_tokens_after_the_pooled_one_are_not_computed(
    tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EOS, appended, that doubles as padding, and padding in the text itself."""
    subject = Scorer.load(ModelConfig(model=tiny_model, seed=42, pad_token="</s>"))
    batches: list[Any] = []
    honest = subject._rewards
    monkeypatch.setattr(subject, "_rewards", lambda batch: batches.append(batch) or honest(batch))
    outcomes = subject.score([Text("", text) for text in ("It is true.", "It is true.</s></s>")])
    [[branch]] = batches
    text = branch.ids
    assert text[-1] != subject._model.pad_id
    assert len(set(values(outcomes))) == 1
    assert [outcome.tokens for outcome in outcomes] == [len(text) + 1, len(text) + 2]


def test_score_keeps_the_rows_order(scorer: Scorer) -> None:
    samples = [Text("", text) for text in TEXTS]
    assert values(scorer.score(samples[::-1])) == pytest.approx(
        values(scorer.score(samples))[::-1], abs=1e-6
    )


@pytest.mark.parametrize("kernels", ["compiled", "none"])
def test_nan_of_one_text_costs_no_other_its_reward(
    kernels: str, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts that share their start with it, which a kernel computes beside it."""
    if kernels == "none":
        monkeypatch.setattr("rayreward.model.find_kernels", lambda: "not here")
    subject = Scorer.load(ModelConfig(model=tiny_model, seed=42))
    start = "It is a long beginning that all of them have, word for word. "
    samples = [Text(start, f"And an end: {end}") for end in ("a", "b", "Q", "c")]
    expected = values(subject.score(samples))
    [token] = subject._tokenizer.hf("Q", add_special_tokens=False)["input_ids"]
    weights = subject._model._module.get_input_embeddings().weight
    with torch.no_grad():
        weights[token] = float("nan")
    outcomes = subject.score(samples)
    assert getattr(outcomes.pop(2), "status", None) is Status.NOT_FINITE
    assert values(outcomes) == [*expected[:2], expected[3]]


def test_score_takes_what_a_pool_takes(scorer: Scorer) -> None:
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4."}]
    items = ["fine weather", {"prompt": "fine ", "completion": "weather"}, turns]
    samples = [Text("", "fine weather"), Text("fine ", "weather"), Conversation(turns)]
    assert scorer.score(iter(items)) == scorer.score(samples)
    with pytest.raises(DataError, match="Can't score a value of type int"):
        scorer.score(["a", 3])


def test_score_reports_failures_in_their_places(scorer: Scorer) -> None:
    broken = Failure(Status.MALFORMED, "no")
    outcomes = scorer.score([Text("", "a"), broken, Conversation([{"role": "x", "content": ""}])])
    assert isinstance(outcomes[0], Reward)
    assert outcomes[1] is broken
    assert isinstance(outcomes[2], Failure)


def test_score_looks_past_a_trailing_eos_that_is_padding(tmp_path: Path) -> None:
    """As transformers does: where EOS doubles as padding, `x` and `x</s>` are one text."""
    path = str(make_checkpoint(tmp_path))
    scorer = Scorer.load(ModelConfig(model=path, seed=42, pad_token="</s>"))
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1).eval()
    model.load_state_dict(dict(scorer._model.tensors()))
    ids = AutoTokenizer.from_pretrained(path)("fine weather", return_tensors="pt")
    with torch.no_grad():
        expected = model(**ids).logits.item()
    [outcome] = scorer.score([Text("", "fine weather")])
    assert isinstance(outcome, Reward)
    assert outcome.value == pytest.approx(expected, abs=1e-6)


def test_score_reward_that_is_not_finite_is_a_failure(tmp_path: Path) -> None:
    path = str(make_checkpoint(tmp_path))
    scorer = Scorer.load(ModelConfig(model=path, seed=42))
    scorer._model.head.tensors["score.weight"].fill_(float("nan"))
    [outcome] = scorer.score([Text("", "a")])
    assert isinstance(outcome, Failure)
    assert outcome.status is Status.NOT_FINITE


def test_score_table_adds_a_row_for_every_row(scorer: Scorer) -> None:
    table = pa.table(
        {
            "prompt": ["p"] * 4,
            "chosen": ["good", "fine", None, "x" * 2000],
            "rejected": ["bad", "", "poor", "y"],
        }
    )
    columns = scorer.score_table(table, check_schema(table.schema))
    assert columns["reward_status"].to_pylist() == ["ok", "ok", "malformed", "too_long"]
    assert columns["reward_chosen"].is_null().to_pylist() == [False, False, True, True]
    assert columns["reward_rejected"].null_count == 0
    assert columns["reward_margin"].is_null().to_pylist() == [False, False, True, True]
    assert columns["reward_tokens_chosen"].to_pylist()[3] > 256


def test_score_table_with_invalid_utf8_loses_that_row_alone(scorer: Scorer) -> None:
    bad = pa.array([b"ok", b"\xff\xfe", b"fine"]).view(pa.string())
    table = pa.table({"text": bad})
    columns = scorer.score_table(table, check_schema(table.schema))
    assert columns["reward_status"].to_pylist() == ["ok", "malformed", "ok"]
    assert "UTF-8" in columns["reward_detail"].to_pylist()[1]


def test_fingerprint_names_what_is_held(scorer: Scorer, tiny_model: str) -> None:
    held = scorer.fingerprint()
    again = Scorer.load(ModelConfig(model=tiny_model, seed=42, max_batch_tokens=256)).fingerprint()
    other = Scorer.load(ModelConfig(model=tiny_model, seed=43, max_batch_tokens=256)).fingerprint()
    assert held == again
    assert held.head != other.head
    assert held.body == other.body
    assert held.head_origin == "seeded"


def test_fingerprint_sees_one_flipped_bit_in_the_body(tmp_path: Path) -> None:
    scorer = Scorer.load(ModelConfig(model=str(make_checkpoint(tmp_path)), seed=1))
    before = scorer.fingerprint()
    flip_one_bit(scorer._model._module.model.layers[1].mlp.down_proj)
    after = scorer.fingerprint()
    assert after.body != before.body
    assert after.head == before.head


def test_several_threads_score_at_once_and_each_gets_its_own(scorer: Scorer) -> None:
    """The model is one thread's at a time, and so are the tokenizer's settings."""
    texts = [
        [Text("", f"thread {n}, text {m} " * (m % 5 + 1)) for m in range(20)] for n in range(8)
    ]
    expected = [scorer.score(mine) for mine in texts]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(3):
            assert list(threads.map(scorer.score, texts)) == expected


def test_time_that_the_model_worked_is_counted(scorer: Scorer) -> None:
    time_spent = ModelTime()
    before = time.time()
    scorer.score_groups([[Text("", "a text")]], time_spent)
    assert before <= time_spent.began_s <= time_spent.ended_s <= time.time()
    assert time_spent.busy_s == pytest.approx(time_spent.ended_s - time_spent.began_s)


def test_checkpoint_without_a_pad_token_is_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, pad=False)
    config = (path / "config.json").read_text().replace('"pad_token_id": 0', '"pad_token_id": null')
    (path / "config.json").write_text(config)
    with pytest.raises(ModelError, match="no padding token"):
        Scorer.load(ModelConfig(model=str(path), seed=1))


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_exact_duplicates_are_scored_once(
    tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a row and across rows; each still has its own audit."""
    make_checkpoint(tmp_path, architecture)
    config = ModelConfig(model=str(tmp_path), seed=42, max_length=20, truncation="right")
    subject = Scorer.load(config)
    groups = [["a b", "c", "a b"], ["c", "d" * 40], ["d" * 60, "a b"], ["c"]]
    scored: list[tuple[int, ...]] = []
    rewards = subject._rewards

    def counted(batch: Any) -> Any:
        scored.extend(branch.ids for branch in batch)
        return rewards(batch)

    monkeypatch.setattr(subject, "_rewards", counted)
    found = subject.score_groups([[Text("", text) for text in group] for group in groups])
    assert len(scored) == len(set(scored)) == 3
    expected = [[values(subject.score([Text("", text)]))[0] for text in group] for group in groups]
    assert [values(group) for group in found] == [
        [pytest.approx(value, abs=1e-6) for value in group] for group in expected
    ]
    assert [group[-1].truncated for group in found] == [False, True, False, False]


def test_a_system_prompt_and_a_prompt_are_computed_once_for_all_rows(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever order the rows come; each has the reward that it has by itself."""
    system = {"role": "system", "content": "You grade answers to sums, and you are strict. " * 3}
    asked = [{"role": "user", "content": f"What are {n} and {n}? Think it over."} for n in (2, 3)]
    rows = [
        Conversation([system, question, {"role": "assistant", "content": answer}])
        for answer in ("They are 4.", "They are 6.", "No idea.")
        for question in asked
    ]
    batches: list[Any] = []
    honest = scorer._rewards
    monkeypatch.setattr(scorer, "_rewards", lambda batch: batches.append(batch) or honest(batch))
    together = scorer.score(rows)
    [batch] = batches
    beginnings = {branch.ids[:n] for branch in batch for n in range(1, len(branch.ids) + 1)}
    assert sum(branch.own for branch in batch) == len(beginnings) < 300
    assert sum(len(branch.ids) for branch in batch) > 900
    assert together == [scorer.score([row])[0] for row in rows]


def test_fingerprint_travels_without_torch(tiny_model: str) -> None:
    """A driver that unpickled a value of torch's would import it, and hold 250 MB more."""
    scorer = Scorer.load(ModelConfig(model=tiny_model, seed=42))
    assert b"torch." not in pickle.dumps((scorer.fingerprint(), scorer.prove()))
