"""Environments of the peers whose packages can't be in the project's own.

A peer with a file in `requirements/` gets one in `build/peers/`, made on the first call and made
again when its file changes. The files have every version, so that packages come without being
searched for what fits together, two at once; torch alone is asked for what it needs, which depends
on the machine. The others run in the environment that runs this.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "peers"


class Unavailable(Exception):
    """A peer's packages can't be installed; says why."""


def has_its_own(peer: str) -> bool:
    """Whether its packages can't be in the project's environment."""
    return _requirements(peer).exists()


def python_of(peer: str) -> Path:
    """The interpreter that has the peer's packages.

    Raises:
        Unavailable: They can't be installed.
    """
    requirements = _requirements(peer)
    if not requirements.exists():
        return Path(sys.executable)
    home = BUILD / peer
    installed = home / "installed.txt"
    if not installed.exists() or installed.read_text() != requirements.read_text():
        install(home, requirements)
        installed.write_text(requirements.read_text())
    return home / "bin" / "python"


def _requirements(peer: str) -> Path:
    return HERE / "requirements" / f"{peer}.txt"


def install(home: Path, requirements: Path) -> None:
    print(f"installing {requirements.stem} (a few minutes, once)", file=sys.stderr, flush=True)
    lines = requirements.read_text().splitlines()
    packages = [line for line in lines if line and not line.startswith("#")]
    pip = (home / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(sys.executable, "-m", "venv", "--clear", home)
    halves = (packages[half::2] for half in range(2))
    with ThreadPoolExecutor(2) as both:
        list(
            both.map(lambda half: run(*pip, "install", "--no-compile", "--no-deps", *half), halves)
        )
    run(*pip, "install", "--no-compile", *(p for p in packages if p.startswith("torch==")))


def run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        why = next((line for line in said if line.startswith("ERROR")), said[-1])
        raise Unavailable(f"not installed: {why}")
