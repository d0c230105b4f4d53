"""`import rayreward` is light: torch, transformers and Ray come when they are first used."""

from __future__ import annotations

import ast
import importlib.util
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import rayreward

HEAVY = {
    "activations",
    "actor",
    "asking",
    "attention",
    "budget",
    "experts",
    "flat",
    "fleet",
    "fusing",
    "head",
    "integrations",
    "invariance",
    "job",
    "keeper",
    "loading",
    "local",
    "model",
    "narrowing",
    "operators",
    "pooling",
    "positions",
    "rotary",
    "packing",
    "panels",
    "oom",
    "pool",
    "recurrence",
    "remote",
    "scorer",
    "serve",
    "trial",
    "verification",
}
"""The modules that work with torch or Ray; every other one must not need either."""

CODE = """
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
    loaded = {{"torch", "transformers", "ray"}} & sys.modules.keys()
    if loaded:
        sys.exit(f"import {{name}} imports {{', '.join(sorted(loaded))}}")
"""


def _modules() -> list[str]:
    found = [module.name for module in pkgutil.walk_packages(rayreward.__path__, "rayreward.")]
    return sorted(name for name in found if name.split(".")[1] != "__main__")


def _import(modules: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", CODE.format(modules=modules)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(rayreward.__file__).parents[1],
    )


def _home(name: str) -> str:
    (module,) = [module for module, names in rayreward._HOME.items() if name in names]
    return module


def test_import_of_the_package_is_light() -> None:
    done = _import(["rayreward"])
    assert (done.returncode, done.stderr) == (0, "")


def test_import_of_every_module_that_need_not_know_torch_or_ray_is_light() -> None:
    light = [name for name in _modules() if name.split(".")[1] not in HEAVY]
    assert len(light) > 20
    done = _import(light)
    assert (done.returncode, done.stderr) == (0, "")


def test_import_exceptions_are_modules_that_exist() -> None:
    assert {f"rayreward.{name}" for name in HEAVY} <= set(_modules())


def test_import_all_lists_every_public_name_once_and_sorted() -> None:
    assert rayreward.__all__ == sorted(set(rayreward.__all__))
    homes = {name for names in rayreward._HOME.values() for name in names}
    assert homes == set(rayreward.__all__) - {"__version__"}


@pytest.mark.parametrize("name", [name for name in rayreward.__all__ if name != "__version__"])
def test_import_public_names_resolve(name: str) -> None:
    module = _home(name)
    if module not in HEAVY:
        assert getattr(rayreward, name).__name__ == name
        return
    spec = importlib.util.find_spec(f"rayreward.{module}")
    assert spec is not None
    assert spec.origin is not None
    defined = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
    assert name in {node.name for node in defined if isinstance(node, ast.ClassDef)}


def test_import_version_is_a_string() -> None:
    assert rayreward.__version__.count(".") == 2


def test_import_of_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'rayreward' has no attribute 'RewardPol'"):
        _ = rayreward.RewardPol


def test_what_a_checkpoint_tells_is_read_without_torch(tiny_model: str) -> None:
    """As a driver does, which then holds some 250 MB less all through a job."""
    code = (
        "import sys; from rayreward.checkpoint import open_checkpoint\n"
        f"open_checkpoint({tiny_model!r})\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
