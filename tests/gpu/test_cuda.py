"""G1 to G3, compiled layers and memory on a GPU, in process. Skipped, and said so, without one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_checkpoint

from rayreward import ModelConfig, ModelError, Scorer
from rayreward.attention import spans
from rayreward.hashing import hash_weights
from rayreward.sizes import ON_GPU
from rayreward.types import Failure, Outcome, Reward, Status, Text

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # the compiler's own
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: CUDA is not tested"),
]

DECODERS = ("llama", "qwen2", "gemma2", "gpt2")
SAMPLES = [Text("", f"Answer {n} " + "it is fine. " * (n * 7 % 23)) for n in range(40)]


def scorer(path: Path, architecture: str, device: str = "cuda:0", **settings: Any) -> Scorer:
    if not path.exists():
        make_checkpoint(path, architecture)
    config = ModelConfig(model=str(path), seed=42, **({"torch_compile": False} | settings))
    return Scorer.load(config, device)


def values(outcomes: list[Outcome]) -> list[float]:
    found = [outcome.value for outcome in outcomes if isinstance(outcome, Reward)]
    assert len(found) == len(outcomes)
    return found


@pytest.mark.parametrize("architecture", [*DECODERS, "bert", "roberta"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_g1_cpu_and_gpu_hold_the_same_bits(tmp_path: Path, architecture: str, dtype: str) -> None:
    """The head is drawn on the CPU wherever the model goes; the hash does not ask where it is."""
    path = make_checkpoint(tmp_path / "model", architecture)
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


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_g3_holds_for_decoders_in_half_precision(tmp_path: Path, architecture: str) -> None:
    """G3, bitwise: streams of all sizes up to 4,096, with a text first, in the middle and last."""
    subject = scorer(tmp_path / "model", architecture, dtype="bfloat16")
    assert subject.fingerprint().batch_invariant == "holds"
    [expected] = values(subject.score([SAMPLES[3]]))
    for size in ON_GPU.up_to(4_096):
        crowd = [Text("", f"{n} is it?") for n in range(size // 6)]
        middle = size // 12
        for at in (0, middle, len(crowd)):
            found = values(subject.score([*crowd[:at], SAMPLES[3], *crowd[at:]]))
            assert found[at] == expected


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_g2_compiled_layers_give_the_same_bits_in_another_process(
    tmp_path: Path, architecture: str
) -> None:
    path = tmp_path / "model"
    plain = scorer(path, architecture, dtype="bfloat16")
    compiled = scorer(path, architecture, dtype="bfloat16", torch_compile=True)
    assert (plain.fingerprint().compiled, compiled.fingerprint().compiled) == (False, True)
    mine = values(compiled.score(SAMPLES))
    assert mine == pytest.approx(values(plain.score(SAMPLES)), abs=0.1)
    code = (
        "import sys\n"
        "from rayreward import ModelConfig, Scorer\n"
        "config = ModelConfig(model=sys.argv[1], seed=42, dtype='bfloat16', torch_compile=True)\n"
        "print(Scorer.load(config, 'cuda:0').fingerprint().probe)"
    )
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(compiled.fingerprint().probe)


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_soft_caps_go_through_flash_attn(
    tmp_path: Path, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rewards near those by blocks, and texts of one token beside others in the same bits."""
    pytest.importorskip("flash_attn", reason="flash-attn is not installed: not tested")
    path = tmp_path / "model"
    capped = scorer(path, "gemma2", dtype="bfloat16", torch_compile=compiled)
    assert capped._model._kernel == "varlen"
    assert capped.fingerprint().batch_invariant == "holds"
    subjects = [*SAMPLES, *(Text("", letter) for letter in "abcdefgh")]
    found = values(capped.score(subjects))
    assert found == [value for text in subjects for value in values(capped.score([text]))]
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    spans._flash_attn.cache_clear()
    by_blocks = scorer(path, "gemma2", dtype="bfloat16", torch_compile=compiled)
    assert by_blocks._model._kernel == "blocks"
    spans._flash_attn.cache_clear()
    assert found == pytest.approx(values(by_blocks.score(subjects)), abs=0.1)


@pytest.fixture
def little_memory() -> Iterator[Any]:
    """Leaves so many bytes beside what is in use."""
    total = torch.cuda.get_device_properties(0).total_memory

    def leave(more: int) -> None:
        torch.cuda.empty_cache()
        used = torch.cuda.memory_reserved(0)
        torch.cuda.set_per_process_memory_fraction((used + more) / total, 0)

    yield leave
    torch.cuda.set_per_process_memory_fraction(1.0, 0)


def test_out_of_memory_goes_on_in_halves_and_a_text_too_large_is_told(
    tmp_path: Path, little_memory: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A batch of 800,000 tokens, and then a text of 600,000, with 60 MB to spare."""
    path = tmp_path / "model"
    make_checkpoint(path, "llama", shape={"max_position_embeddings": 1_000_000})
    budget = {"max_batch_tokens": 1_000_000, "batch_invariant": False}
    subject = scorer(path, "llama", dtype="bfloat16", **budget)
    many = [Text("", f"{n} " + "it is fine. " * 40) for n in range(2_000)]
    expected = values(subject.score(many))
    little_memory(60 << 20)
    assert values(subject.score(many)) == pytest.approx(expected, abs=0.05)
    assert "going on with half" in caplog.text
    huge = Text("", "it is fine. " * 60_000)
    first, told, last = subject.score([many[0], huge, many[1]])
    assert isinstance(told, Failure)
    assert (told.status, told.tokens) == (Status.OUT_OF_MEMORY, pytest.approx(600_000, rel=0.1))
    assert values([first, last]) == pytest.approx(expected[:2], abs=0.05)


@pytest.mark.parametrize("architecture", DECODERS)
def test_gpu_agrees_with_the_cpu(tmp_path: Path, architecture: str) -> None:
    path = tmp_path / "model"
    on_gpu = values(scorer(path, architecture, dtype="float32").score(SAMPLES))
    on_cpu = values(scorer(path, architecture, "cpu", dtype="float32").score(SAMPLES))
    assert on_gpu == pytest.approx(on_cpu, abs=1e-4)
