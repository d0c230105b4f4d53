"""operators: in C++ and in Python they give the same bits, and refuse the same things."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_checkpoint

from rayreward import flat, operators, packing
from rayreward.attention import Score
from rayreward.attention.compiled import Compiled
from rayreward.native import find_kernels
from rayreward.operators import compile_operators
from rayreward.packing import can_pack

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(
    str(find_kernels()).startswith("no C++ compiler"), reason="no C++ compiler here"
)


@pytest.fixture(autouse=True)
def _in_cpp() -> None:
    assert compile_operators() is None


def stream(*, causal: bool = True) -> Compiled:
    """Of 24 tokens: a text of 9, one of 12 that shares 5 with it, and 8 to fill it up."""
    first = np.arange(9)
    second = np.concatenate([first[:5], np.arange(9, 16)])
    return Compiled([first, second], [0, 5], CPU, causal=causal)


def heads(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 6, 24, 16), (1, 2, 24, 16), (1, 2, 24, 8))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def attend(attention: Compiled, tensors: list[torch.Tensor], score: Score) -> torch.Tensor:
    return flat.attend_in_graph(
        *tensors, None, None, score.scaling, score.window, score.softcap, attention.causal
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "score", [Score(None, None, None), Score(0.3, 4, None), Score(None, None, 2.0)]
)
def test_attention_has_the_bits_of_the_kernel_and_is_counted(
    score: Score, causal: bool, dtype: torch.dtype
) -> None:
    attention = stream(causal=causal)
    tensors = heads(dtype)
    with attention.entered():
        found = attend(attention, tensors, score)
        assert attention.calls == 1
        odd = [torch.stack([x, x], dim=-1)[..., 0] for x in tensors]
        assert torch.equal(attend(attention, odd, score), found), "values that lie apart"
    expected = attention.attend(*(x[0].transpose(0, 1) for x in tensors), score)
    assert attention.calls == 3
    assert torch.equal(found[0], expected)
    assert (found[0, 16:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_turns_queries_and_keys_as_the_kernel_does(dtype: torch.dtype) -> None:
    attention = stream()
    tensors = heads(dtype)
    angles = [torch.rand(1, 1, 24, 16).to(dtype) for _ in range(2)]
    apart = [torch.stack([x, x], dim=-1)[..., 0] for x in angles]
    with attention.entered():
        found = flat.attend_in_graph(*tensors, *angles, None, None, None, True)
        assert torch.equal(flat.attend_in_graph(*tensors, *apart, None, None, None, True), found)
    expected = attention.attend(
        *(x[0].transpose(0, 1) for x in tensors),
        Score(None, None, None),
        (angles[0][0, 0], angles[1][0, 0]),
    )
    assert torch.equal(found[0], expected)


def test_attention_refuses_what_it_can_not_do() -> None:
    plain = Score(None, None, None)
    attention = stream()
    with pytest.raises(RuntimeError, match="outside of a pass over a stream"):
        attend(attention, heads(), plain)
    with attention.entered():
        with pytest.raises(RuntimeError, match="in float32 and bfloat16 only"):
            attend(attention, heads(torch.float16), plain)
        attention.causal = False
        with pytest.raises(RuntimeError, match="attention of the other kind"):
            attend(attention, heads(), plain)
    with pytest.raises(RuntimeError, match="outside of a pass over a stream"):
        attend(attention, heads(), plain)


@pytest.mark.skipif(not can_pack(torch.float32), reason="oneDNN's order is not for this machine")
@pytest.mark.parametrize("rows", [(1, 24), (1, 2), (5,)])
@pytest.mark.parametrize("biased", [True, False])
def test_products_have_the_bits_of_onednn(rows: tuple[int, ...], biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=generator) for s in ((*rows, 32), (48, 32), (48,)))
    ordered = torch.ops.mkldnn._reorder_linear_weight(weight, 2_048)
    held = bias if biased else None
    found = packing.multiply_in_graph(x, ordered, held)
    multiply = torch.ops.mkldnn._linear_pointwise
    assert torch.equal(found, multiply(x, ordered, held, "none", [], ""))
    torch.testing.assert_close(found, torch.nn.functional.linear(x, weight, held))


SCORES = """
import sys
from rayreward import ModelConfig, Scorer, operators
from rayreward.types import Text
if sys.argv[2] == "Python":
    import rayreward.fusing
    rayreward.fusing.compile_operators = lambda: "no C++ compiler"
scorer = Scorer.load(ModelConfig(model=sys.argv[1], seed=42, torch_compile=True), "cpu")
assert scorer.fingerprint().compiled
assert (operators._enter is None) == (sys.argv[2] == "Python")
print([r.value.hex() for r in scorer.score([Text("ab", " cd" * n) for n in (1, 3, 50)])])
"""


@pytest.mark.slow
def test_a_compiled_model_scores_the_same_where_they_are_in_python(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, shape={"num_hidden_layers": 4})

    def scores(language: str) -> Any:
        command = [sys.executable, "-c", SCORES, str(tmp_path), language]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert scores("Python") == scores("C++") != ""


def test_why_they_are_not_in_cpp_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_enter", None)
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    assert str(compile_operators()).startswith("no C++ compiler: looked for")
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(operators, "_FLAGS", ())
    assert "torch" in str(compile_operators()), "no headers of torch are found"
