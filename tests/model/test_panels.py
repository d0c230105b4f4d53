"""panels: products by our own kernel are right, and a row's bits are its own (G3)."""

from __future__ import annotations

import pytest
import torch

from rayreward import packing, panels
from rayreward.native import find_kernels
from rayreward.operators import compile_operators

pytestmark = pytest.mark.skipif(
    str(find_kernels()).startswith("no C++ compiler"), reason="no C++ compiler here"
)

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(576, 576), (16, 7), (1536, 576), (64, 1), (32, 4_400)]


def product(shape: tuple[int, int], *, biased: bool) -> tuple[torch.Tensor, ...]:
    """Rows, weight and bias."""
    generator = torch.Generator().manual_seed(0)
    out, width = shape
    rows = torch.randn(1, 300, width, generator=generator)
    weight = torch.randn(shape, generator=generator)
    bias = torch.randn(out, generator=generator) if biased else torch.zeros(out)
    return rows, weight, bias


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_right_and_weights_come_back(shape: tuple[int, int], biased: bool) -> None:
    rows, weight, bias = product(shape, biased=biased)
    held = panels.to_panels(weight)
    assert torch.equal(panels.from_panels(held), weight)
    found = panels.multiply(rows, held, bias if biased else None)
    expected = rows.double() @ weight.double().t() + bias
    torch.testing.assert_close(found.double(), expected, atol=2e-5 * shape[1] ** 0.5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_bfloat16_is_summed_as_float32_and_rounded_once(
    shape: tuple[int, int], biased: bool
) -> None:
    rows, weight, bias = product(shape, biased=biased)
    rows, weight = rows.bfloat16(), weight.bfloat16()
    held = panels.to_panels(weight)
    assert held.dtype is torch.bfloat16
    assert torch.equal(panels.from_panels(held), weight)
    some = bias if biased else None
    expected = panels.multiply(rows.float(), panels.to_panels(weight.float()), some)
    assert torch.equal(panels.multiply(rows.float(), held, some), expected)
    assert torch.equal(panels.multiply(rows, held, some), expected.bfloat16())


def test_what_is_not_finite_is_passed_on_in_bfloat16() -> None:
    inf, nan = float("inf"), float("nan")
    rows = torch.tensor([[1.0, 0.0], [inf, 1.0], [-inf, 1.0], [nan, 1.0]]).bfloat16()
    found = panels.multiply(rows, panels.to_panels(torch.ones(16, 2).bfloat16()))
    for row, expected in zip(found, (1.0, inf, -inf, nan), strict=True):
        torch.testing.assert_close(row, torch.full((16,), expected).bfloat16(), equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_g3_a_row_keeps_its_bits_beside_others_and_on_any_threads(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    rows, weight, bias = product(shape, biased=True)
    rows, held = rows.to(dtype), panels.to_panels(weight.to(dtype))
    expected = panels.multiply(rows, held, bias)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for start, end in ((0, 1), (3, 8), (100, 107), (1, 300)):
                found = panels.multiply(rows[:, start:end], held, bias)
                assert torch.equal(found, expected[:, start:end])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operator_has_the_bits_of_the_kernel(biased: bool, dtype: torch.dtype) -> None:
    assert compile_operators() is None
    rows, weight, bias = product((48, 32), biased=biased)
    held = panels.to_panels(weight.to(dtype))
    some = bias if biased else None
    apart = torch.stack([rows, rows], dim=-1)[..., 0]
    for given in (rows, apart, rows[0], rows.to(dtype)):
        found = packing.multiply_in_graph(given, held, some)
        assert torch.equal(found, panels.multiply(given, held, some))


def test_rows_of_another_width_are_refused() -> None:
    assert compile_operators() is None
    rows, weight, _ = product((48, 32), biased=False)
    held = panels.to_panels(weight)
    for multiply in (packing.multiply_in_graph, panels.multiply):
        with pytest.raises(RuntimeError, match="wide|columns"):
            multiply(rows[..., :8], held, None)


def test_rows_of_another_precision_than_the_weight_are_refused() -> None:
    assert compile_operators() is None
    rows, weight, _ = product((48, 32), biased=False)
    held = panels.to_panels(weight)
    for multiply in (packing.multiply_in_graph, panels.multiply):
        with pytest.raises(RuntimeError, match=r"precision|rows in torch.bfloat16"):
            multiply(rows.bfloat16(), held, None)


def test_no_rows_give_no_results() -> None:
    held = panels.to_panels(torch.ones(32, 5))
    assert panels.multiply(torch.zeros(2, 0, 5), held).shape == (2, 0, 32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_whole_panels_fit(dtype: torch.dtype) -> None:
    assert panels.fits(torch.zeros(32, 5, dtype=dtype))
    assert not panels.fits(torch.zeros(31, 5, dtype=dtype))
    assert not panels.fits(torch.zeros(32, 5, dtype=torch.float16))
