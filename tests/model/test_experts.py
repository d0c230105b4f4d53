"""experts: a mixture's experts with packed weights give the same, and a token its own bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_checkpoint
from torch import nn
from transformers import GptOssConfig, NemotronHConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from rayreward import ModelConfig, Scorer
from rayreward.experts import PackedExperts, pack_experts, unpack_experts
from rayreward.packing import can_pack

pytestmark = pytest.mark.skipif(
    not can_pack(torch.float32), reason="no oneDNN here: weights stay in plain order"
)

H, WIDTH, E, K = 64, 48, 6, 2

EXPERTS: dict[str, Callable[[], Any]] = {
    "with gates": lambda: Qwen3MoeExperts(
        Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=WIDTH, num_experts=E)
    ),
    "transposed, in turns and with biases": lambda: GptOssExperts(
        GptOssConfig(hidden_size=H, intermediate_size=WIDTH, num_local_experts=E)
    ),
    "without gates": lambda: NemotronHExperts(
        NemotronHConfig(hidden_size=H, moe_intermediate_size=WIDTH, n_routed_experts=E)
    ),
}


def made(name: str, dtype: torch.dtype) -> nn.ModuleDict:
    """Experts with random weights, as a part of a model."""
    torch.manual_seed(0)
    experts = EXPERTS[name]()
    for weights in experts.parameters():
        nn.init.normal_(weights, std=0.1)
    return nn.ModuleDict({"experts": experts.to(dtype).eval().requires_grad_(False)})


def routed(tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States of tokens, their experts and how much those count."""
    dice = torch.Generator().manual_seed(1)
    states = torch.randn(tokens, H, generator=dice).to(dtype)
    scores, chosen = torch.rand(tokens, E, generator=dice).topk(K)
    return states, chosen, scores.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EXPERTS)
def test_packed_experts_give_what_transformers_own_give(name: str, dtype: torch.dtype) -> None:
    model = made(name, dtype)
    expected = model["experts"](*routed(40, dtype))
    pack_experts(model)
    assert any(isinstance(part, PackedExperts) for part in model.modules())
    found = model["experts"](*routed(40, dtype))
    assert found.dtype is dtype
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EXPERTS)
def test_weights_come_back_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    model = made(name, dtype)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    expected = model["experts"](*routed(40, dtype))
    pack_experts(model)
    unpack_experts(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(model["experts"](*routed(40, dtype)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EXPERTS)
def test_g3_a_token_keeps_its_bits_whoever_shares_its_experts(
    name: str, dtype: torch.dtype
) -> None:
    """G3, bitwise: alone, where its experts get one row, and among any number of others."""
    model = made(name, dtype)
    pack_experts(model)
    states, chosen, scores = routed(90, dtype)
    expected = model["experts"](states, chosen, scores)
    for count in (1, 2, 3, 7, 8, 30):
        for start in range(0, 90 - count, 17):
            some = slice(start, start + count)
            found = model["experts"](states[some], chosen[some], scores[some])
            assert torch.equal(found, expected[some])


def test_a_scorer_packs_them_and_hashes_what_was_stored(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from rayreward.hashing import hash_weights

    path = make_checkpoint(tmp_path, "qwen2_moe", head=True)
    scorer = Scorer.load(ModelConfig(model=str(path)), "cpu")
    packed = [m for m in scorer._model._module.modules() if isinstance(m, PackedExperts)]
    assert len(packed) == 4  # two layers' first and last products
    held = dict(scorer._model.tensors())
    assert "model.layers.1.mlp.experts.gate_up_proj" in held
    assert list(held) == sorted(held)
    del held["score.weight"]
    assert scorer.fingerprint().body == hash_weights(held.items())
    stored = load_file(path / "model.safetensors")
    down = [stored[f"model.layers.1.mlp.experts.{e}.down_proj.weight"] for e in range(4)]
    assert torch.equal(held["model.layers.1.mlp.experts.down_proj"], torch.stack(down))
