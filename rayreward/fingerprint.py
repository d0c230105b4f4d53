"""Hashes of what decides a reward, and the environment it was computed in.

Knows tensors and tokenizers; does not know Ray, or what to do when two fingerprints differ
(`rayreward.determinism`).
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


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


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What one actor holds. Equal fingerprints mean the same model, bit for bit.

    The hashes are SHA-256, in hexadecimal.
    """

    head: str
    body: str
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
    max_batch_tokens: int
    attention: str
    layout: str
    """`flat`, `padded` or `single` (`rayreward.model`)."""
    share_prefixes: bool
    batch_invariant: str
    """G3 on this hardware: `holds`, `not tried`, or which change of company moved a bit."""
    environment: Environment

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


def hash_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over name, dtype, shape and bytes of each tensor, in the order of their names.

    Bytes are little-endian and row-major. Every part is preceded by its length, so that no two
    different sets of tensors give the same stream of bytes.
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        dtype = str(tensor.dtype).removeprefix("torch.")
        header = json.dumps([name, dtype, list(tensor.shape)]).encode()
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(len(header).to_bytes(8, "little") + header)
        digest.update(content.nbytes.to_bytes(8, "little"))
        digest.update(content.data)
    return digest.hexdigest()


def hash_text(text: str) -> str:
    """SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def hash_tokenizer(hf: Any) -> str:
    """SHA-256 over everything that decides how a tokenizer cuts text."""
    backend = getattr(hf, "backend_tokenizer", None)
    if backend is not None:
        content = backend.to_str()
    else:
        content = json.dumps(sorted(hf.get_vocab().items()))
    special = json.dumps(hf.special_tokens_map, sort_keys=True, default=str)
    return hash_text(f"{type(hf).__name__}\n{special}\n{content}")


def find_environment(device: torch.device) -> Environment:
    """What this process computes with."""
    import tokenizers
    import torch
    import transformers

    on_gpu = device.type == "cuda"
    return Environment(
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        tokenizers=tokenizers.__version__,
        cpu=torch.backends.cpu.get_cpu_capability(),
        device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
    )
