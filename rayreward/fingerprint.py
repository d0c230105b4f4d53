"""What one actor holds and computes with, as values that can be compared and stored.

Does not know Ray, or what to do when two fingerprints differ (`rayreward.determinism`).
"""

from __future__ import annotations

import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayreward.native import Kernels, find_kernels

if TYPE_CHECKING:
    import torch

_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, slots=True)
class Environment:
    """What can move the last bits of a reward although model and data are the same."""

    python: str
    torch: str
    transformers: str
    tokenizers: str
    cpu: str
    """The instruction set that torch's CPU kernels use, such as AVX512."""
    device: str
    """`cpu`, or the GPU's name."""
    cuda: str | None = None
    """Version that torch was built with, for a GPU."""
    driver: str | None = None
    """The GPU driver's version, where the system tells it."""
    kernels: str | None = None
    """The compiled CPU kernels (`rayreward.native`); null where there are none, or for a GPU."""


@dataclass(frozen=True, slots=True)
class Proof:
    """The part of a fingerprint that a bad device or a stray write could change later.

    Attributes:
        head: As in `Fingerprint`.
        body: As in `Fingerprint`.
        derived: As in `Fingerprint`.
        probe: As in `Fingerprint`.
    """

    head: str
    body: str
    derived: str
    probe: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What one actor holds. Equal fingerprints mean the same model, bit for bit.

    Hashes are 64 hexadecimal digits (`rayreward.hashing`).
    """

    head: str
    """SHA-256 of the classification head."""
    body: str
    """Integer hash of every other parameter and stored buffer."""
    tokenizer: str
    chat_template: str | None
    head_origin: str
    """`trained`, or `seeded`: drawn, untrained."""
    revision: str | None
    architecture: str
    dtype: str
    max_length: int | None
    truncation: str
    pad_id: int
    share_prefixes: bool
    max_batch_tokens: int
    attention: str
    """What computes it: a kernel of `rayreward.attention`, or transformers' function."""
    layout: str
    """`flat`, `padded` or `single` (`rayreward.model`)."""
    compiled: bool
    """Whether what layers do between their products is fused (`rayreward.fusing`)."""
    batch_invariant: str
    """G3 on this hardware: `holds`, `not tried`, or which change of company moved a bit."""
    derived: str
    """Integer hash of the buffers that are computed while loading, such as rotary frequencies."""
    probe: tuple[float | None, ...]
    """Rewards of a fixed set of texts (`rayreward.probe`), float32; null where there is none."""
    environment: Environment

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {**asdict(self), "probe": list(self.probe)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Fingerprint:
        """The fingerprint that `to_dict` turned into plain values."""
        environment = Environment(**values["environment"])
        probe = tuple(values["probe"])
        return cls(**{**values, "probe": probe, "environment": environment})


def find_environment(device: torch.device) -> Environment:
    """What this process computes with."""
    import tokenizers
    import torch
    import transformers

    on_gpu = device.type == "cuda"
    kernels = None if on_gpu else find_kernels()
    return Environment(
        python=platform.python_version(),
        torch=str(
            torch.__version__
        ),  # of a class of its own, which a driver would import torch for
        transformers=transformers.__version__,
        tokenizers=tokenizers.__version__,
        cpu=torch.backends.cpu.get_cpu_capability(),
        device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
        cuda=torch.version.cuda if on_gpu else None,
        driver=_driver() if on_gpu else None,
        kernels=kernels.identity if isinstance(kernels, Kernels) else None,
    )


def _driver() -> str | None:
    """The driver's version, such as `570.86.15`. Source: the NVIDIA kernel module's own file."""
    try:
        found = re.search(r"\d+\.\d+(\.\d+)?", _DRIVER.read_text(encoding="utf-8"))
    except OSError:
        return None
    return found[0] if found else None
