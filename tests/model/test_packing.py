"""packing: oneDNN's order of the weights, the same products and the same hash, held once."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from tiny import make_checkpoint
from torch import nn
from transformers.pytorch_utils import Conv1D

from rayreward import ModelConfig, Scorer, packing
from rayreward.packing import PackedLinear, can_pack, pack_linear_layers, unpack_linear_layers

pytestmark = pytest.mark.skipif(
    not can_pack(torch.float32), reason="no oneDNN here: weights stay in plain order"
)

SHAPES = [(576, 576), (192, 576), (1536, 576), (31, 65), (1, 7), (4096, 64)]


def dtypes() -> list[torch.dtype]:
    return [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_packed_layer_gives_back_its_weights_and_close_products(
    shape: tuple[int, int], bias: bool
) -> None:
    for dtype in dtypes():
        torch.manual_seed(0)
        linear = nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype).requires_grad_(False)
        layer = PackedLinear(linear)
        held = layer.plain()
        assert held.keys() == dict(linear.named_parameters()).keys()
        assert all(torch.equal(held[name], tensor) for name, tensor in linear.named_parameters())
        assert all(held[name].dtype is dtype for name in held)
        rows = torch.randn(1, 48, shape[1], dtype=dtype)
        found, expected = layer(rows), linear(rows)
        assert found.shape == expected.shape
        assert found.dtype is dtype
        torch.testing.assert_close(found, expected)


def test_conv1d_is_packed_and_given_back() -> None:
    """GPT-2's layers: as linear ones are, with their weights the other way round."""
    torch.manual_seed(0)
    layer = Conv1D(48, 32).requires_grad_(False)
    module = nn.ModuleList([layer])
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    rows = torch.randn(1, 40, 32)
    expected = layer(rows)
    pack_linear_layers(module, lambda name: True)
    assert isinstance(module[0], PackedLinear)
    torch.testing.assert_close(module[0](rows), expected)
    held = module[0].plain()
    assert all(torch.equal(held[name], before[f"0.{name}"]) for name in ("weight", "bias"))
    unpack_linear_layers(module)
    assert type(module[0]) is Conv1D
    assert torch.equal(module[0](rows), expected)


@pytest.mark.parametrize("threads", [1, 2, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_g3_rows_keep_their_bits_in_any_number(shape: tuple[int, int], threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dtype in dtypes():
            torch.manual_seed(0)
            layer = PackedLinear(nn.Linear(shape[1], shape[0], dtype=dtype).requires_grad_(False))
            rows = torch.randn(2_048, shape[1], dtype=dtype)
            expected = layer(rows)
            for start, end in ((0, 16), (16, 48), (512, 768), (1_024, 2_048), (2_032, 2_048)):
                assert torch.equal(layer(rows[start:end].clone()), expected[start:end])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("name", "tiles", "has_instructions", "has_kernel", "wide"),
    [
        ("Intel Xeon", False, True, False, True),
        ("Intel Xeon", True, True, False, False),
        ("AMD EPYC", False, True, False, False),
        ("AMD EPYC", False, False, False, True),
        ("AMD EPYC", False, False, True, False),
    ],
)
def test_bfloat16_is_held_wide_where_its_products_would_be_slower(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    tiles: bool,
    has_instructions: bool,
    has_kernel: bool,
    wide: bool,
) -> None:
    has = {"cpu_name": name, "amx_bf16": tiles}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    monkeypatch.setattr(packing, "has_bfloat16", lambda: has_instructions)
    monkeypatch.setattr(packing.panels, "is_faster", lambda: has_kernel)
    # oneDNN looks for them itself
    monkeypatch.setattr(packing, "packed", packing.as_multiplied)
    layer = PackedLinear(nn.Linear(8, 16, dtype=torch.bfloat16))
    assert (layer.weight.dtype, layer.dtype) == (
        torch.float32 if wide else torch.bfloat16,
        torch.bfloat16,
    )


def test_without_onednn_nothing_of_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that was built without it does not even have its operators."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    assert not packing.has_bfloat16()
    assert not can_pack(torch.bfloat16)
    module = nn.ModuleDict({"a": nn.Linear(8, 8, dtype=torch.bfloat16)})
    pack_linear_layers(module, lambda _: True)
    assert type(module["a"]) is nn.Linear


def test_layers_are_replaced_where_wanted_and_a_shared_one_stays_one() -> None:
    shared = nn.Linear(8, 8)
    module = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared, nn.Linear(8, 1)])})
    module.requires_grad_(False)
    pack_linear_layers(module, lambda name: name != "b.1")
    assert isinstance(module["a"], PackedLinear)
    assert module["a"] is module["b"][0]
    assert type(module["b"][1]) is nn.Linear
    assert shared.weight is None  # freed, and not held twice


@pytest.mark.parametrize("dtype", dtypes())
def test_unpacked_layers_are_what_they_were(dtype: torch.dtype) -> None:
    shared = nn.Linear(8, 8, dtype=dtype)
    module = nn.ModuleList([shared, shared, nn.Linear(8, 3, bias=False, dtype=dtype)])
    module.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    pack_linear_layers(module, lambda name: True)
    unpack_linear_layers(module)
    assert [type(layer) for layer in module] == [nn.Linear] * 3
    assert module[0] is module[1]
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(tensor.requires_grad for tensor in module.parameters())


def test_weights_are_put_into_plain_order_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them at once would be the model once more, at every look."""
    scorer = Scorer.load(ModelConfig(model=str(make_checkpoint(tmp_path, head=True))), "cpu")
    honest, seen = packing.unpacked, []

    def counted(weight: torch.Tensor) -> torch.Tensor:
        assert sum(plain() is not None for plain in seen) <= 1
        plain = honest(weight)
        seen.append(weakref.ref(plain))
        return plain

    monkeypatch.setattr(packing, "unpacked", counted)
    scorer.prove()
    assert len(seen) == 14


def test_g1_packed_weights_have_the_hash_of_the_files(tmp_path: Path) -> None:
    """What is hashed is what rewards are computed from, by name, shape, dtype and bits."""
    from safetensors.torch import load_file

    from rayreward.hashing import hash_weights

    path = make_checkpoint(tmp_path, head=True)
    scorer = Scorer.load(ModelConfig(model=str(path)))
    layer = scorer._model._module.model.layers[0].mlp.up_proj
    assert isinstance(layer, PackedLinear)
    stored = load_file(path / "model.safetensors")
    head = stored.pop("score.weight")
    assert scorer.fingerprint().body == hash_weights(stored.items())
    assert torch.equal(scorer._model.head.tensors["score.weight"], head)
