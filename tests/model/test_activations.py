"""activations: an element's bits do not depend on how many there are, nor on how many threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from rayreward.activations import WholeVectors, WholeVectorsOfFunctions, keep_whole_vectors

FUNCTIONS = ["silu", "sigmoid", "gelu", "gelu_pytorch_tanh", "quick_gelu", "gelu_new", "mish"]


@pytest.fixture(params=[1, 2, 3, 5, 7, 16, 31, 64], ids="{} threads".format)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_g3_an_element_keeps_its_bits_in_any_number_of_rows(name: str, dtype: torch.dtype) -> None:
    function = WholeVectors(ACT2FN[name])
    rows = torch.randn(1_024, 1_536, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = torch.cat([ACT2FN[name](row) for row in rows.split(8)])  # each by one thread
    for count in (*range(8, 400, 56), 424, 680, 1_024):
        assert torch.equal(function(rows[:count].clone()), expected[:count])


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("width", [1, 5, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "function", [torch.sigmoid, torch.Tensor.sigmoid, nn.functional.silu, nn.functional.softplus]
)
def test_g3_what_a_model_calls_by_itself_keeps_an_elements_bits(
    function: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype, width: int
) -> None:
    """A gate has one number a token, a router one for each expert: no whole vectors."""
    rows = torch.randn(3_000, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    with WholeVectorsOfFunctions() as functions:
        expected = function(rows)
        for count in (1, 8, 24, 999, 2_000):
            assert torch.equal(function(rows[:count]), expected[:count])
            assert torch.equal(function(rows[-count:]), expected[-count:])
    assert functions.called


def test_activation_modules_do_not_count_as_functions() -> None:
    with WholeVectorsOfFunctions() as functions:
        WholeVectors(ACT2FN["silu"])(torch.randn(3, 5))
        torch.exp(torch.randn(3, 5))
    assert not functions.called


def test_a_function_that_gets_its_argument_by_name_still_works() -> None:
    x = torch.randn(3, 5)
    with WholeVectorsOfFunctions():
        found = torch.sigmoid(input=x)
    assert torch.equal(found, torch.sigmoid(x))


@pytest.mark.parametrize("shape", [(1, 8, 5), (3, 1), (0, 64), (1, 1_000, 96)])
def test_any_shape_and_layout_gives_what_the_function_gives(shape: tuple[int, ...]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(7)
    try:
        function = WholeVectors(nn.SiLU())
        x = torch.randn(shape)
        for each in (x, x.transpose(0, 1), torch.randn(*shape[:-1], 2 * shape[-1]).chunk(2, -1)[1]):
            found = function(each)
            assert found.shape == each.shape
            torch.testing.assert_close(found, nn.functional.silu(each))
    finally:
        torch.set_num_threads(before)


def test_activations_are_replaced_and_a_shared_one_stays_one() -> None:
    shared = ACT2FN["silu"]
    module = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared, nn.Linear(2, 2), nn.GELU()])})
    keep_whole_vectors(module)
    assert isinstance(module["a"], WholeVectors)
    assert module["a"] is module["b"][0]
    assert type(module["b"][1]) is nn.Linear
    assert isinstance(module["b"][2], WholeVectors)


@pytest.mark.parametrize("mixing", [nn.Softmax(dim=-1), nn.GLU()])
def test_what_takes_elements_together_is_left_alone(mixing: nn.Module) -> None:
    """Some models hold such a function as a module, as SqueezeBERT does for its attention."""
    module = nn.ModuleDict({"a": mixing})
    keep_whole_vectors(module)
    assert module["a"] is mixing
