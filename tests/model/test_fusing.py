"""fusing: results like those of transformers' modules, in one pass, only where they are alike."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from rayreward.fusing import fuse
from rayreward.native import find_kernels

pytestmark = pytest.mark.skipif(
    isinstance(find_kernels(), str), reason=f"no compiled kernels here: {find_kernels()}"
)

DTYPES = [torch.float32, torch.bfloat16]
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 72,  # 36 to a half of a head's depth: no multiple of what a vector holds
    "intermediate_size": 1_000,  # no multiple of what is widened at once
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "pad_token_id": 0,
}
FUSED = {
    "llama": {"LlamaRMSNorm", "LlamaMLP", "LlamaAttention"},
    "qwen3": {"Qwen3RMSNorm", "Qwen3MLP", "Qwen3Attention"},
    "olmo2": {"Olmo2RMSNorm", "Olmo2MLP", "Olmo2Attention"},
    "gemma": {"GemmaAttention"},  # norms scale by 1 + weight, gates are GELU
    "gpt2": set(),
}


def make(kind: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(kind, **SIZES)).to(dtype).eval()
    for name, tensor in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(tensor, mean=1.0, std=0.3)
    return model.requires_grad_(False)


def fused_parts(model: nn.Module) -> set[str]:
    return {type(part).__name__ for part in model.modules() if "forward" in vars(part)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", FUSED)
def test_only_what_computes_the_same_is_fused_and_undone_at_will(
    kind: str, dtype: torch.dtype
) -> None:
    model = make(kind, dtype)
    tokens = torch.arange(40)[None]
    expected = model(tokens).last_hidden_state
    undo = fuse(model)
    assert fused_parts(model) == FUSED[kind]
    found = model(tokens).last_hidden_state
    if dtype is torch.float32:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    else:
        exact = make(kind, torch.float32)
        exact.load_state_dict(model.state_dict())
        exact = exact(tokens).last_hidden_state
        # rounded less often: no further from the truth than transformers
        assert (found.float() - exact).norm() < 1.1 * (expected.float() - exact).norm()
    undo()
    assert fused_parts(model) == set()
    assert torch.equal(model(tokens).last_hidden_state, expected)


def calls(dtype: torch.dtype) -> dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], int]]:
    """Fused parts as functions of rows, and how wide these are."""
    model = make("llama", dtype)
    fuse(model)
    layer: Any = model.layers[0]  # type: ignore[index, union-attr]
    rotate = layer.self_attn.forward.__func__.__globals__["apply_rotary_pos_emb"]
    angles = torch.linspace(0, 3, 12).to(dtype)[None, None]

    def turned(rows: torch.Tensor) -> torch.Tensor:
        heads = rows.unflatten(-1, (6, 12)).transpose(0, 1)[None]
        cosine, sine = (each.expand(1, len(rows), 12) for each in (angles.cos(), angles.sin()))
        queries, keys = rotate(heads, heads[:, :2], cosine, sine)
        torch.testing.assert_close(queries[:, :2], keys, rtol=0, atol=0, equal_nan=True)
        return queries[0].transpose(0, 1).flatten(1)

    # products may differ with the number of rows here, packed ones do not: gates by themselves
    gated = copy.copy(layer.mlp)
    gated.gate_proj = gated.up_proj = gated.down_proj = nn.Identity()
    gated.forward = layer.mlp.forward.__func__.__get__(gated)
    return {
        "norm": (lambda rows: layer.input_layernorm(rows), 72),
        "gates": (lambda rows: gated(rows.clone()), 1_000),
        "rotation": (turned, 72),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", ["norm", "gates", "rotation"])
def test_g3_row_has_its_bits_alone_and_in_any_crowd(part: str, dtype: torch.dtype) -> None:
    function, width = calls(dtype)[part]
    torch.manual_seed(0)
    rows = torch.randn(1_000, width).to(dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = function(rows)
        torch.set_num_threads(2)
        for start, end in ((0, 1_000), (0, 1), (7, 8), (999, 1_000), (3, 500)):
            assert torch.equal(function(rows[start:end].clone()), expected[start:end])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", ["norm", "gates", "rotation"])
def test_nan_stays_in_its_row(part: str, dtype: torch.dtype) -> None:
    function, width = calls(dtype)[part]
    rows = torch.linspace(-3, 3, 5 * width).to(dtype).reshape(5, width)
    expected = function(rows)
    rows[2, 17] = float("nan")
    found = function(rows)
    assert found[2].isnan().any()
    others = [0, 1, 3, 4]
    assert torch.equal(found[others], expected[others])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_of_any_size_are_right(dtype: torch.dtype) -> None:
    function, width = calls(dtype)["gates"]
    sizes = torch.tensor([-1e30, -100.0, -87.5, -20.0, -1.0, -1e-20, 0.0, 1e-20, 1.0, 20.0, 90.0])
    rows = sizes.to(dtype)[:, None].expand(-1, width).contiguous()
    exact = nn.functional.silu(rows.double()) * rows.double()
    found = function(rows).double()
    tolerance = 1e-6 if dtype is torch.float32 else 4e-3
    torch.testing.assert_close(found, exact, rtol=tolerance, atol=1e-30)
