"""attention: each kernel is plain attention over each text; on a CPU a token keeps its bits."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from rayreward.attention import Score, compiled, make_attention, spans
from rayreward.attention.blocks import Blocks
from rayreward.attention.compiled import Compiled
from rayreward.attention.spans import Spans
from rayreward.flat import lay_out
from rayreward.native import Kernels, find_kernels, load_kernels
from rayreward.native.compiler import find_compiler
from rayreward.types import Branch

CPU = torch.device("cpu")
NEEDS_COMPILER = pytest.mark.skipif(
    str(find_kernels()).startswith("no C++ compiler"), reason="no C++ compiler here"
)
COMPILED = pytest.param("compiled", marks=NEEDS_COMPILER)
PLAIN = Score(None, None, None)
SCORES = [PLAIN, Score(0.3, None, None), Score(None, 20, None), Score(None, None, 2.0)]


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def branches(*lengths: tuple[int, int]) -> list[Branch]:
    """Texts of so many tokens, the second number of which are shared with the one before."""
    return [Branch((3,) * tokens, shared) for tokens, shared in lengths]


def tensors(tokens: int, dtype: torch.dtype, heads: int = 6, kv_heads: int = 2) -> Any:
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, heads, 64), (tokens, kv_heads, 64), (tokens, kv_heads, 64))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def plainly(q: Any, k: Any, v: Any, score: Score, *, causal: bool) -> torch.Tensor:
    """One text's attention, `(L, heads, D)`, in float64, where the last queries may be alone."""
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (k, v))
    products = q @ k.transpose(1, 2) * (score.scaling or q.shape[-1] ** -0.5)
    if score.softcap is not None:
        products = torch.tanh(products / score.softcap) * score.softcap
    query = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None]
    key = torch.arange(k.shape[1])
    back = k.shape[1] if score.window is None else score.window
    seen = (query - key < back) & (key <= query if causal else key - query < back)
    return (products.masked_fill(~seen, float("-inf")).softmax(-1) @ v).transpose(0, 1)


def by_definition(
    query: Any,
    key: Any,
    value: Any,
    cu_seq_q: Any,
    cu_seq_k: Any,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    softcap: float | None = None,
    enable_gqa: bool = True,
    num_splits: int | None = 1,
) -> torch.Tensor:
    """What torch's varlen_attn documents, for a CPU, where its kernel does not run."""
    assert max_q == cu_seq_q.diff().max()
    assert max_k == cu_seq_k.diff().max()
    assert (enable_gqa, num_splits) == (True, 1)
    back, ahead = window_size
    assert ahead in (0, back)
    score = Score(scale, None if back < 0 else back + 1, softcap)
    spans = zip(
        query.tensor_split(cu_seq_q[1:-1].long()),
        key.tensor_split(cu_seq_k[1:-1].long()),
        value.tensor_split(cu_seq_k[1:-1].long()),
        strict=True,
    )
    return torch.cat([plainly(*s, score, causal=ahead == 0) for s in spans]).to(query.dtype)


def flash_by_definition(
    *tensors_and_lengths: Any, softmax_scale: float | None, causal: bool, **options: Any
) -> torch.Tensor:
    """Likewise what flash-attn's flash_attn_varlen_func documents; its window may look ahead."""
    assert options["softcap"] is not None
    assert causal == (options["window_size"][1] == 0)
    return by_definition(*tensors_and_lengths, scale=softmax_scale, **options)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("score", SCORES, ids=["plain", "scaled", "window", "softcap"])
@pytest.mark.parametrize("kernel", [COMPILED, "blocks", "varlen"])
def test_every_text_is_attended_to_as_if_alone(
    kernel: Any, score: Score, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spans, "varlen_attn", by_definition)
    monkeypatch.setattr(spans, "_varlen_options", lambda: {"enable_gqa": True, "num_splits": 1})
    monkeypatch.setattr(spans, "_flash_attn", lambda: flash_by_definition)
    batch = branches(
        (75, 0), (70, 70), (160, 70), (130, 90), (132, 1), (1, 0), (67, 1), (129, 0), (2, 0)
    )
    stream = lay_out(batch, 0, CPU, kernel=kernel, causal=causal)
    q, k, v = tensors(stream.ids.shape[1], torch.float32)
    found = stream.attention.attend(q, k, v, score)
    for text in stream.texts:
        expected = plainly(q[text], k[text], v[text], score, causal=causal)
        torch.testing.assert_close(found[text].double(), expected, atol=2e-5, rtol=0)
    filling = np.setdiff1d(np.arange(stream.ids.shape[1]), np.concatenate(stream.texts))
    assert 0 < len(filling) < 75  # a text of its own
    expected = plainly(q[filling], k[filling], v[filling], score, causal=causal)
    torch.testing.assert_close(found[filling].double(), expected, atol=2e-5, rtol=0)


def turned(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotary embeddings by definition, in float64."""
    cosines, sines, x = (values.double() for values in (cosines[:, None], sines[:, None], x))
    first, second = x.chunk(2, -1)
    return x * cosines + torch.cat([-second, first], -1) * sines


def check_turning(dtype: torch.dtype) -> None:
    """Right, whatever strides angles have, and (G3, bitwise) whoever else is there."""
    batch = branches((75, 0), (70, 70), (160, 70), (132, 1), (1, 0), (129, 0))
    stream = lay_out(batch, 0, CPU, kernel="compiled")
    q, k, v = tensors(stream.ids.shape[1], dtype)
    radians = torch.arange(len(q))[:, None] * torch.linspace(0.01, 1, 64)
    angles = radians.cos().to(dtype), radians.sin().to(dtype)
    attention_ = stream.attention
    assert isinstance(attention_, Compiled)
    found = attention_.attend(q, k, v, PLAIN, angles)
    apart = [torch.stack([x, x], -1)[..., 0] for x in angles]
    assert torch.equal(attention_.attend(q, k, v, PLAIN, (apart[0], apart[1])), found)
    for text in stream.texts:
        cosines, sines = (x[text] for x in angles)
        expected = plainly(
            turned(q[text], cosines, sines),
            turned(k[text], cosines, sines),
            v[text],
            PLAIN,
            causal=True,
        )
        close = 2e-5 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(found[text].double(), expected, atol=close, rtol=0)
        alone = Compiled([np.arange(len(text))], [0], CPU, causal=True)
        assert torch.equal(
            alone.attend(q[text], k[text], v[text], PLAIN, (cosines, sines)), found[text]
        )


@NEEDS_COMPILER
@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_kernel_turns_queries_and_keys(dtype: torch.dtype) -> None:
    check_turning(dtype)


@pytest.fixture(scope="module", params=["haswell", "x86-64"], ids=["AVX2", "SSE2"])
def narrow_kernels(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Kernels:
    """The kernels as they are compiled for older processors, which take other sizes of tiles."""
    folder = tmp_path_factory.mktemp(request.param)
    script = folder / "c++"
    script.write_text(f'#!/bin/sh\nexec {find_compiler()} "$@" -march={request.param}\n')
    script.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", str(script))
        patch.setenv("XDG_CACHE_HOME", str(folder))
        return load_kernels()


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="no processor that has AVX2",
)
@NEEDS_COMPILER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("score", SCORES, ids=["plain", "scaled", "window", "softcap"])
def test_the_compiled_kernel_is_right_in_narrower_vectors_too(
    narrow_kernels: Kernels,
    score: Score,
    causal: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Close to plain attention, and (G3, bitwise) a text keeps its bits without its neighbours."""
    monkeypatch.setattr(compiled, "find_kernels", lambda: narrow_kernels)
    batch = branches((75, 0), (70, 70), (160, 70), (132, 1), (1, 0), (129, 0))
    stream = lay_out(batch, 0, CPU, kernel="compiled", causal=causal)
    q, k, v = tensors(stream.ids.shape[1], dtype)
    found = stream.attention.attend(q, k, v, score)
    for text in stream.texts:
        expected = plainly(q[text], k[text], v[text], score, causal=causal)
        close = 2e-5 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(found[text].double(), expected, atol=close, rtol=0)
        alone = make_attention("compiled", [np.arange(len(text))], [0], CPU, causal=causal)
        assert torch.equal(alone.attend(q[text], k[text], v[text], score), found[text])


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="no processor that has AVX2",
)
@NEEDS_COMPILER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_kernel_turns_them_in_narrower_vectors_too(
    narrow_kernels: Kernels, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "find_kernels", lambda: narrow_kernels)
    check_turning(dtype)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernel", [COMPILED, "blocks"])
def test_g3_tokens_keep_their_bits_beside_any_number_of_others(
    kernel: Any, causal: bool, dtype: torch.dtype
) -> None:
    """G3, bitwise: short texts and long ones, alone and beside 1 to 60 of like length."""
    for length in (5, 64, 200, 1_500):
        together = 61 if length < 1_500 else 7
        q, k, v = tensors(length * together, dtype)
        places = [np.arange(n * length, (n + 1) * length) for n in range(together)]
        for number in (1, 2, 3, together):
            crowd = make_attention(kernel, places[:number], [0] * number, CPU, causal=causal)
            found = crowd.attend(q, k, v, PLAIN)
            for chosen in {0, number - 1}:
                alone = make_attention(kernel, [places[chosen]], [0], CPU, causal=causal)
                expected = alone.attend(q, k, v, PLAIN)[places[chosen]]
                assert torch.equal(found[places[chosen]], expected)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("score", SCORES, ids=["plain", "scaled", "window", "softcap"])
@pytest.mark.parametrize("kernel", [COMPILED, "blocks"])
def test_g3_tokens_keep_their_bits_with_prefixes_shared_anywhere(
    kernel: Any, score: Score, dtype: torch.dtype
) -> None:
    """G3, bitwise: wherever a text is cut into what it shares and what it does not."""
    length = 333
    q, k, v = tensors(length, dtype)
    text = np.arange(length)
    expected = make_attention(kernel, [text], [0], CPU, causal=True).attend(q, k, v, score)
    for shared in (1, 5, 63, 64, 65, 100, 256, 332):
        owned = text[shared:]
        rest = make_attention(kernel, [text], [shared], CPU, causal=True).attend(q, k, v, score)
        assert torch.equal(rest[owned], expected[owned])
        assert (rest[:shared] == 0).all()


@pytest.mark.parametrize("kernel", [COMPILED, "blocks"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (5, 5), (12, 2), (7, 1)])
@pytest.mark.parametrize("depth", [8, 64, 80, 96, 128, 256])
def test_heads_of_any_number_and_width(kernel: Any, heads: int, kv_heads: int, depth: int) -> None:
    text = np.arange(130)
    q, k, v = (torch.randn(130, n, depth) for n in (heads, kv_heads, kv_heads))
    v = v[:, :, : depth // 2 * 2 - 3]  # values may be narrower than keys
    q = q.transpose(0, 1).contiguous().transpose(0, 1)  # as the model hands them over
    found = make_attention(kernel, [text], [0], CPU, causal=True).attend(q, k, v, PLAIN)
    expected = plainly(q, k, v, PLAIN, causal=True)
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kernel", [COMPILED])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_broken_numbers_stay_in_their_own_text(kernel: Any, broken: float) -> None:
    """A branch that is not finite spoils neither its prefix nor the branches beside it."""
    batch = branches((90, 0), (90, 70), (30, 0))
    stream = lay_out(batch, 0, CPU, kernel=kernel, causal=True)
    q, k, v = tensors(stream.ids.shape[1], torch.float32)
    expected = stream.attention.attend(q, k, v, PLAIN)
    for x in (q, k, v):
        x[75:80] = broken  # in the first branch
    found = stream.attention.attend(q, k, v, PLAIN)
    fine = np.setdiff1d(np.arange(len(q)), np.arange(70, 90))
    assert torch.equal(found[fine], expected[fine])
    assert found[89].isnan().all()


@pytest.mark.parametrize("kernel", [COMPILED])
def test_compiled_kernel_is_as_exact_as_float32_lets_it_be(kernel: Any) -> None:
    """Also where scores are large, small, or all alike; rounding to bfloat16 happens once."""
    text = np.arange(300)
    q, k, v = tensors(300, torch.float32)
    for scaling in (0.0, 1e-4, 1.0, 30.0):
        score = Score(scaling, None, None)
        attention_ = make_attention(kernel, [text], [0], CPU, causal=True)
        found = attention_.attend(q, k, v, score)
        products = (
            q.double().transpose(0, 1) @ k.double().repeat_interleave(3, 1).permute(1, 2, 0)
        ) * scaling
        products += torch.full((300, 300), float("-inf"), dtype=torch.float64).triu(1)
        expected = (
            products.softmax(-1) @ v.double().repeat_interleave(3, 1).transpose(0, 1)
        ).transpose(0, 1)
        torch.testing.assert_close(found.double(), expected, atol=2e-5 * max(scaling, 0.1), rtol=0)
    halves = [x.bfloat16() for x in (q, k, v)]
    exact = attention_.attend(*(x.float() for x in halves), PLAIN).bfloat16()
    assert torch.equal(attention_.attend(*halves, PLAIN), exact)


def test_compiled_kernel_refuses_what_it_can_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    if not isinstance(find_kernels(), str):
        one = make_attention("compiled", [np.arange(4)], [0], CPU, causal=True)
        with pytest.raises(ValueError, match="no torch.float16"):
            one.attend(*tensors(4, torch.float16), PLAIN)
    monkeypatch.setattr(compiled, "find_kernels", lambda: "no C++ compiler")
    with pytest.raises(ValueError, match=r"no compiled kernel on cpu: no C\+\+ compiler"):
        make_attention("compiled", [np.arange(4)], [0], CPU, causal=True)


def test_kernels_go_by_their_names() -> None:
    places = [np.arange(4)]
    assert isinstance(make_attention("blocks", places, [0], CPU, causal=True), Blocks)
    assert isinstance(make_attention("varlen", places, [0], CPU, causal=True), Spans)
    if not isinstance(find_kernels(), str):
        assert isinstance(make_attention("compiled", places, [0], CPU, causal=True), Compiled)


@pytest.mark.parametrize("broken", [None, types.ModuleType("flash_attn")], ids=["absent", "old"])
def test_without_flash_attn_soft_caps_are_refused(
    broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", broken)
    spans._flash_attn.cache_clear()
    capped = make_attention("varlen", [np.arange(4)], [0], CPU, causal=True)
    with pytest.raises(ValueError, match="torch's variable-length kernel has no soft cap: .*flash"):
        capped.attend(*tensors(4, torch.bfloat16), Score(None, None, 50.0))


def test_options_of_the_kernel_are_those_that_torch_knows() -> None:
    assert spans._varlen_options() == {"enable_gqa": True, "num_splits": 1}
