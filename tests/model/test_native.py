"""native: kernels are compiled once, kept under a name that says for what, and never needed."""

from __future__ import annotations

import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import make_checkpoint

from rayreward import ModelConfig, Scorer
from rayreward.native import Kernels, compiler, find_kernels, load_kernels
from rayreward.native.compiler import NotCompiled
from rayreward.types import Reward, Text

pytestmark = pytest.mark.skipif(
    str(find_kernels()).startswith("no C++ compiler"), reason="no C++ compiler here"
)
"""Where there is one, it has to be able to compile them."""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "rayreward" / "native"


def fake_compiler(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_kernels_are_compiled_once_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_kernels()
    [library] = cache.glob("*.so")
    assert library.name == f"kernels-{first.identity}.so"
    assert sorted(path.name for path in cache.iterdir()) == [library.name, "lock"]
    made = library.stat().st_mtime_ns
    monkeypatch.setattr(compiler, "_compile", lambda *_: pytest.fail("compiled twice"))
    assert load_kernels().identity == first.identity
    assert library.stat().st_mtime_ns == made


def test_another_compiler_or_processor_is_another_file(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load_kernels().identity
    other = fake_compiler(tmp_path / "c++", 'exec g++ "$@" -DANOTHER_TARGET')
    monkeypatch.setenv("CXX", other)
    assert load_kernels().identity != plain
    assert len(list(cache.glob("*.so"))) == 2


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (None, "no C\\+\\+ compiler: looked for .*/c\\+\\+"),
        ("echo out of order >&2; exit 1", "c\\+\\+ failed: out of order"),
        ("case $* in *-dM*) exit 0;; esac; echo no OpenMP >&2; exit 1", "failed: no OpenMP"),
        ("case $* in *-dM*) exit 0;; esac; for o; do :; done; echo no > $o", "can't be loaded"),
    ],
    ids=["none", "broken", "can't compile", "makes rubbish"],
)
def test_no_kernels_and_why(
    script: str | None, why: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c++"
    monkeypatch.setenv("CXX", fake_compiler(path, script) if script else str(path))
    with pytest.raises(NotCompiled, match=why):
        load_kernels()
    assert not [made for made in cache.glob("*") if made.suffix != ".so" and made.name != "lock"]


def test_a_cache_that_can_not_be_written_to_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert isinstance(load_kernels(), Kernels)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_apple_s_compiler_is_given_the_openmp_that_torch_brings(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has none, so that it does not know -fopenmp, nor does it know -march=native."""
    monkeypatch.setattr(compiler, "sys", SimpleNamespace(platform="darwin"))
    monkeypatch.setenv("CXX", fake_compiler(tmp_path / "c++", 'echo "told $*" >&2; exit 1'))
    with pytest.raises(NotCompiled) as told:
        load_kernels()
    libraries = Path(torch.__file__).parent / "lib"
    openmp = f"-Xclang -fopenmp {libraries}/libomp.dylib -Wl,-rpath,{libraries} "
    assert openmp in str(told.value)
    assert "native " not in str(told.value)
    assert not list(cache.glob("*.so"))


def test_models_run_without_kernels_too_and_say_which_they_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(model=str(make_checkpoint(tmp_path, head=True)))
    samples = [Text("the prompt", f" and answer {n}" * n) for n in range(5)]
    found = {}
    for kernel in ("compiled", "blocks"):
        scorer = Scorer.load(config)
        fingerprint = scorer.fingerprint()
        assert (fingerprint.attention, fingerprint.layout) == (kernel, "flat")
        assert bool(fingerprint.environment.kernels) == (kernel == "compiled")
        outcomes = scorer.score(samples)
        assert all(isinstance(outcome, Reward) for outcome in outcomes)
        found[kernel] = torch.tensor([o.value for o in outcomes if isinstance(o, Reward)])
        monkeypatch.setattr("rayreward.model.find_kernels", lambda: "none")
        monkeypatch.setattr("rayreward.fingerprint.find_kernels", lambda: "none")
    torch.testing.assert_close(found["compiled"], found["blocks"], atol=1e-5, rtol=0)
