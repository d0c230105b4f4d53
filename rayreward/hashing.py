"""Hashes of weights, tokenizers and text. Does not know what they are compared with, or Ray.

Two kinds. SHA-256 for what is small: it cannot be forged. An integer hash for the body, which runs
at memory speed on the device where the weights are: it finds every accident, but does not stand up
to somebody who makes weights to fit it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rayreward.native import Kernels, find_kernels

if TYPE_CHECKING:
    import torch

_LANES = 2
_CHUNK_WORDS = 16_384
_CHUNKS_AT_ONCE = 16
"""What fits a core's cache. On a GPU 64 times as many keep it busy."""


def hash_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over name, dtype, shape and bytes of each tensor, in the order of their names.

    Bytes are little-endian and row-major. Every part is preceded by its length, so that no two
    different sets of tensors give the same stream of bytes.
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        _add(digest, _header(name, tensor))
        _add(digest, content.data)
    return digest.hexdigest()


def hash_weights(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A hash like `hash_tensors`, computed where the tensors are, at about the speed of memory.

    A tensor's bytes are read as 32-bit words w, in chunks of 16,384. A chunk becomes two sums of
    w_i · k_i modulo 2^64, one for each lane, with fixed odd 64-bit keys k_i that were drawn from
    SHAKE-128. Names, dtypes, shapes and all the sums go through SHA-256.

    One changed word in a chunk always shows, since an odd number times anything that is no multiple
    of 2^64 is none either. Any other accident goes unseen with a probability of at most 2^-32 a
    lane, 2^-64 in all. Integers have no rounding, so a CPU and a GPU give the same hash.
    Source: multilinear hashing, Lemire and Kaser 2014, arXiv:1202.4961.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    # one tensor at a time: put into plain order for this, all of them would be the model once more
    summed = [(name, _header(name, tensor), _chunk_sums(tensor)) for name, tensor in tensors]
    for _, header, sums in sorted(summed, key=lambda item: item[0]):
        _add(digest, header)
        _add(digest, sums.tobytes())
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


def _header(name: str, tensor: torch.Tensor) -> bytes:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return json.dumps([name, dtype, list(tensor.shape)]).encode()


def _add(digest: hashlib._Hash, content: bytes | memoryview) -> None:
    digest.update(memoryview(content).nbytes.to_bytes(8, "little"))
    digest.update(content)


def _chunk_sums(tensor: torch.Tensor) -> NDArray[np.int64]:
    """The sums of each chunk of a tensor, `(chunks, lanes)`."""
    words = _words(tensor)
    if tensor.device.type == "cpu":
        return _sums_on_host(words.numpy())
    return _sums_on_device(words).cpu().numpy()


def _sums_on_host(words: NDArray[np.int32]) -> NDArray[np.int64]:
    """By our own kernel, on all threads, or where there is none by NumPy."""
    import torch

    kernels = find_kernels()
    if not isinstance(kernels, Kernels):
        return _sums_by_numpy(words)
    low, high = _halves()
    sums = np.empty((-(-len(words) // _CHUNK_WORDS), _LANES), dtype=np.int64)
    kernels.hash(
        *(words.ctypes.data, len(words)),
        *(low.ctypes.data, high.ctypes.data, _CHUNK_WORDS),
        *(sums.ctypes.data, torch.get_num_threads()),
    )
    return sums


def _sums_by_numpy(words: NDArray[np.int32]) -> NDArray[np.int64]:
    """On one thread, in buffers that stay in the cache: five times as fast as torch."""
    import torch

    keys = [key.numpy() for key in _keys(torch.device("cpu"))]
    sums = [np.empty((0, _LANES), dtype=np.int64)]
    wide, product = np.empty((2, _CHUNKS_AT_ONCE, _CHUNK_WORDS), dtype=np.int64)
    for chunks in _chunks(words):
        rows, columns = chunks.shape
        np.copyto(wide[:rows, :columns], chunks)
        lanes = []
        for key in keys:
            np.multiply(wide[:rows, :columns], key[:columns], out=product[:rows, :columns])
            lanes.append(product[:rows, :columns].sum(axis=1))
        sums.append(np.stack(lanes, axis=1))
    return np.concatenate(sums)


def _sums_on_device(words: torch.Tensor) -> torch.Tensor:
    """By torch, in a quarter of a gigabyte of the device's memory."""
    import torch

    keys = _keys(words.device)
    sums = [torch.empty((0, _LANES), dtype=torch.int64, device=words.device)]
    for chunks in _chunks(words, at_once=64 * _CHUNKS_AT_ONCE):
        wide = chunks.long()
        sums.append(torch.stack([(wide * k[: wide.shape[1]]).sum(1) for k in keys], dim=1))
    return torch.cat(sums)


def _chunks(words: Any, at_once: int = _CHUNKS_AT_ONCE) -> Iterator[Any]:
    """Whole chunks, several at once, then what is left; each `(chunks, words)`."""
    whole = len(words) // _CHUNK_WORDS * _CHUNK_WORDS
    for start in range(0, whole, at_once * _CHUNK_WORDS):
        end = min(start + at_once * _CHUNK_WORDS, whole)
        yield words[start:end].reshape(-1, _CHUNK_WORDS)
    if whole < len(words):
        yield words[whole:][None]


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes as 32-bit words, filled up with zeros to a whole one."""
    import torch

    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if len(content) % 4 or content.storage_offset() % 4:
        filled = content.new_zeros(-(-len(content) // 4) * 4)
        filled[: len(content)] = content
        content = filled
    return content.view(torch.int32)


@lru_cache(maxsize=16)
def _keys(device: torch.device) -> tuple[torch.Tensor, ...]:
    import torch

    drawn = hashlib.shake_128(b"RayReward weights").digest(_LANES * _CHUNK_WORDS * 8)
    odd = np.frombuffer(drawn, dtype="<i8").astype(np.int64) | 1
    return tuple(torch.from_numpy(odd).reshape(_LANES, -1).to(device).unbind())


@cache
def _halves() -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The keys as low + 2^32 · high, both of them signed, `(lanes, chunk)` each."""
    import torch

    keys = torch.stack(_keys(torch.device("cpu"))).numpy()
    low = keys.astype(np.int32)
    return low, ((keys - low) >> 32).astype(np.int32)
