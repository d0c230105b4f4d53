"""G1 to G3 on a GPU, in process. Skipped, and said so, where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_checkpoint

from rayreward import ModelConfig, ModelError, Scorer
from rayreward.hashing import hash_weights
from rayreward.types import Outcome, Reward, Text

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: CUDA is not tested"),
]

DECODERS = ("llama", "qwen2", "gemma2", "gpt2")
SAMPLES = [Text("", f"Answer {n} " + "it is fine. " * (n * 7 % 23)) for n in range(40)]


def scorer(path: Path, architecture: str, device: str = "cuda:0", **settings: Any) -> Scorer:
    if not path.exists():
        make_checkpoint(path, architecture)
    return Scorer.load(ModelConfig(model=str(path), seed=42, **settings), device)


def values(outcomes: list[Outcome]) -> list[float]:
    found = [outcome.value for outcome in outcomes if isinstance(outcome, Reward)]
    assert len(found) == len(outcomes)
    return found


@pytest.mark.parametrize("architecture", [*DECODERS, "bert", "roberta"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_g1_cpu_and_gpu_hold_the_same_bits(tmp_path: Path, architecture: str, dtype: str) -> None:
    """The head is drawn on the CPU wherever the model goes; the hash does not ask where it is."""
    path = tmp_path / "model"
    state = torch.cuda.get_rng_state()
    on_gpu = scorer(path, architecture, dtype=dtype).fingerprint()
    assert torch.equal(torch.cuda.get_rng_state(), state)
    on_cpu = scorer(path, architecture, "cpu", dtype=dtype).fingerprint()
    assert (on_gpu.head, on_gpu.body) == (on_cpu.head, on_cpu.body)
    assert on_gpu.environment.device == torch.cuda.get_device_name(0)
    assert on_gpu.environment.cuda == torch.version.cuda


def test_g1_hash_of_large_tensors_is_the_same_on_both_devices() -> None:
    tensors = [("a", torch.randn(3_000, 7_001)), ("b", torch.randn(999).bfloat16())]
    assert hash_weights(tensors) == hash_weights([(n, t.cuda()) for n, t in tensors])


@pytest.mark.parametrize("architecture", DECODERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_g2_two_loads_give_the_same_bits(tmp_path: Path, architecture: str, dtype: str) -> None:
    path = tmp_path / "model"
    first, second = (scorer(path, architecture, dtype=dtype) for _ in range(2))
    assert values(first.score(SAMPLES)) == values(second.score(SAMPLES))
    assert values(first.score(SAMPLES)) == values(second.score(SAMPLES))
    assert first.fingerprint() == second.fingerprint()


@pytest.mark.parametrize("architecture", [*DECODERS, "bert"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_g3_verdict_is_recorded_and_true(tmp_path: Path, architecture: str, dtype: str) -> None:
    subject = scorer(tmp_path / "model", architecture, dtype=dtype)
    verdict = subject.fingerprint().batch_invariant
    print(f"{architecture} {dtype} on {torch.cuda.get_device_name(0)}: G3 {verdict}")
    alone = [value for sample in SAMPLES for value in values(subject.score([sample]))]
    crowd = values(subject.score(SAMPLES))
    assert verdict == "holds" or verdict.startswith("does not hold")
    if verdict == "holds":
        assert crowd == alone
    assert crowd == pytest.approx(alone, abs=1e-4 if dtype == "float32" else 0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_g3_insisted_on_holds_or_is_refused(tmp_path: Path, dtype: str) -> None:
    try:
        subject = scorer(tmp_path / "model", "llama", dtype=dtype, batch_invariant=True)
    except ModelError as error:
        assert "change on this hardware" in str(error)  # noqa: PT017
        return
    alone = [value for sample in SAMPLES for value in values(subject.score([sample]))]
    assert values(subject.score(SAMPLES)) == alone


@pytest.mark.parametrize("architecture", DECODERS)
def test_gpu_agrees_with_the_cpu(tmp_path: Path, architecture: str) -> None:
    path = tmp_path / "model"
    on_gpu = values(scorer(path, architecture, dtype="float32").score(SAMPLES))
    on_cpu = values(scorer(path, architecture, "cpu", dtype="float32").score(SAMPLES))
    assert on_gpu == pytest.approx(on_cpu, abs=1e-4)
