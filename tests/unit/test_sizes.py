"""Sizes of streams: each holds what it is for, there are few of them, and little is wasted."""

from __future__ import annotations

from rayreward.sizes import ON_CPU, ON_GPU, Sizes


def test_multiples() -> None:
    assert [ON_CPU.filled(rows) for rows in (1, 7, 8, 9, 160)] == [8, 8, 8, 16, 160]
    assert list(Sizes(100).up_to(250)) == [100, 200, 300]


def test_few_sizes_for_a_gpu() -> None:
    assert [ON_GPU.filled(rows) for rows in (1, 256, 257, 2_048, 2_049)] == [
        256,
        256,
        512,
        2_048,
        2_304,
    ]
    sizes = list(ON_GPU.up_to(16_384))
    assert len(sizes) == 32
    assert sizes[-9:] == [8_192, *range(9_216, 16_385, 1_024)]


def test_every_number_is_filled_up_to_a_size_that_is_tried() -> None:
    sizes = list(ON_GPU.up_to(16_384))
    for rows in range(1, 16_385):
        size = ON_GPU.filled(rows)
        assert size in sizes
        assert rows <= size <= max(rows + 255, rows * 9 / 8)
        assert ON_GPU.filled(size) == size
