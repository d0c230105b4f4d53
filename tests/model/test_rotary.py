"""rotary: attention turns queries and keys itself where a graph does what transformers does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_checkpoint
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.models.llama.modeling_llama import rotate_half

from rayreward import ModelConfig, Scorer, rotary
from rayreward.flat import attend_in_graph
from rayreward.rotary import LeaveToAttention

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit:DeprecationWarning"
)  # the compiler's own

Turned = Callable[..., tuple[torch.Tensor, torch.Tensor]]

TOKENS, DEPTH = 24, 16


def as_it_should_be(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def keys_are_not_turned(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    return q * cos + rotate_half(q) * sin, k


def keys_by_other_angles(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin.neg()


def crossed_the_other_way(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    def crossed(x: Any) -> Any:
        first, second = x.chunk(2, -1)
        return torch.cat([second, -first], -1)

    return q * cos + crossed(q) * sin, k * cos + crossed(k) * sin


def in_unequal_parts(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    def crossed(x: Any) -> Any:
        return torch.cat([-x[..., 4:], x[..., :4]], -1)

    return q * cos + crossed(q) * sin, k * cos + crossed(k) * sin


def every_head_by_its_own(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    cos, sin = (x.expand(1, 6, TOKENS, DEPTH) * 1 for x in (cos, sin))
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def by_half_precision(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    cos, sin = cos.bfloat16(), sin.bfloat16()
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def attention_in(turned: Turned) -> Node:
    """The call of attention in a function's graph, after the change."""

    def layer(q: Any, k: Any, v: Any, cos: Any, sin: Any) -> torch.Tensor:
        return attend_in_graph(*turned(q, k, cos, sin), v, None, None, 0.25, None, None, True)

    shapes = (*3 * ((1, 6, TOKENS, DEPTH),), *2 * ((1, 1, TOKENS, DEPTH),))
    graph = make_fx(layer, tracing_mode="fake")(*map(torch.zeros, shapes)).graph
    LeaveToAttention()(graph)
    graph.lint()
    [node] = graph.find_nodes(op="call_function", target=torch.ops.rayreward.attention.default)
    return node


def test_angles_are_left_to_attention() -> None:
    node = attention_in(as_it_should_be)
    assert [str(arg) for arg in node.args] == [
        *("q_1", "k_1", "v_1", "cos_1", "sin_1"),
        *("0.25", "None", "None", "True"),
    ]
    assert len(node.graph.nodes) == 7, "what turned them is still there"


@pytest.mark.parametrize(
    "turned",
    [
        keys_are_not_turned,
        keys_by_other_angles,
        crossed_the_other_way,
        in_unequal_parts,
        every_head_by_its_own,
        by_half_precision,
    ],
    ids=lambda turned: turned.__name__,
)
def test_whatever_else_it_is_stays_as_it_is(turned: Turned) -> None:
    assert attention_in(turned).args[3:5] == (None, None)


@pytest.fixture
def _compiled_anew(nothing_compiled: None) -> Iterator[None]:
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("_compiled_anew")
@pytest.mark.parametrize(
    ("architecture", "dtype"), [("llama", "float32"), ("llama", "bfloat16"), ("gemma", "float32")]
)
def test_layers_of_transformers_are_such(
    architecture: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path, architecture, shape={"num_hidden_layers": 3})
    found: list[int] = []
    look = rotary._turned

    def noted(node: Any) -> tuple[Any, ...]:
        found.append(len(look(node)))
        return look(node)

    monkeypatch.setattr(rotary, "_turned", noted)
    config = ModelConfig(model=str(tmp_path), seed=42, dtype=dtype, torch_compile=True)
    assert Scorer.load(config, "cpu").fingerprint().compiled
    assert found == [3, 3], "queries and keys, in the one graph of all layers"
