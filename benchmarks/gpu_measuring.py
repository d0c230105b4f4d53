"""How the GPU benchmark measures: time, memory, kernels, and the GPU itself (`gpu`)."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from common import hardware
from gpu_ways import Rewards, Way
from gpu_workloads import Scale
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

START_S = 20.0
"""Seconds that must be left for something to be begun that has not been timed yet."""


class Clock:
    """The time there is, and what was left out for want of it or because it failed."""

    def __init__(self, budget_s: float) -> None:
        self._start = time.monotonic()
        self._end = self._start + budget_s
        self.left_out: list[str] = []

    def has(self, seconds: float, what: str) -> bool:
        left = self._end - time.monotonic()
        if left < seconds:
            self.left_out.append(f"{what}: {left:.0f} s were left")
        return left >= seconds

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._start

    @contextmanager
    def bearing_failure(self, what: str) -> Iterator[None]:
        """What one way can't do (running out of memory, say) doesn't take the others along."""
        try:
            yield
        except Exception as error:
            self.left_out.append(f"{what}: {repr(error).splitlines()[0][:300]}")


@dataclass(frozen=True, slots=True)
class Measured:
    """What passes over a workload gave, by the name of the way."""

    seconds: dict[str, list[float]]
    memory: dict[str, int]
    rewards: dict[str, Rewards]
    repeats: int
    product_rate: float
    """FLOP/s."""


def measure(ways: Sequence[Way], scale: Scale, clock: Clock, what: str) -> Measured:
    """A pass of each way to warm up, then the ways in turns, as often as the time allows."""
    warm: dict[str, float] = {}
    memory: dict[str, int] = {}
    rewards: dict[str, Rewards] = {}
    for way in ways:
        if clock.has(START_S, f"{what}: {way.name}"):
            with clock.bearing_failure(f"{what}: {way.name}"):
                warm[way.name], rewards[way.name], memory[way.name] = timed(way)
    repeats: list[dict[str, float]] = []
    rates = [product_rate(scale)]
    for number in range(1, scale.repeats + 1):
        if not clock.has(sum(warm.values()), f"{what}: repeat {number} of {scale.repeats}"):
            break
        repeats.append({way.name: timed(way)[0] for way in ways if way.name in warm})
        rates.append(product_rate(scale))
    seconds = {name: [repeat[name] for repeat in repeats or [warm]] for name in warm}
    return Measured(seconds, memory, rewards, len(repeats), statistics.median(rates))


def timed(way: Way) -> tuple[float, Rewards, int]:
    """Seconds, rewards, and the most bytes that were allocated on the GPU."""
    way.prepare()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    rewards = way.run()  # ends with a copy to the host
    seconds = time.perf_counter() - start
    return seconds, rewards, torch.cuda.max_memory_allocated() if on_gpu else 0


def product_rate(scale: Scale, times: int = 20) -> float:
    """FLOP/s of a square matrix product in bfloat16."""
    size, device = scale.product, scale.device
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        left @ right
    synchronize()
    start = time.perf_counter()
    for _ in range(times):
        left @ right
    synchronize()
    return 2 * size**3 * times / (time.perf_counter() - start)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def kernels_of(way: Way) -> dict[str, Any]:
    """Where the time of a way's first batch goes, and how much of it the device was busy."""
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    way.prepare()
    way.run()
    with profile(activities=activities) as profiled:
        start = time.perf_counter()
        way.score(way.batches[0].branches).tolist()
        seconds = time.perf_counter() - start
    spent = {
        event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total
        for event in profiled.key_averages()
        if not on_gpu or event.device_type == DeviceType.CUDA
    }
    total = sum(spent.values()) or 1.0
    most = sorted(spent, key=lambda key: -spent[key])[:12]
    return {
        "busy": round(total / 1e6 / seconds, 3),
        "shares": {key[:120]: round(spent[key] / total, 3) for key in most},
    }


def about_device(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {**hardware(), "gpu": None}
    gpu = torch.cuda.get_device_properties(device)
    asked = ("driver_version", "clocks.max.sm", "power.limit", "mig.mode.current")
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(asked)}", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        **hardware(),
        "gpu": gpu.name,
        "memory_gb": round(gpu.total_memory / 1e9, 1),
        "multiprocessors": gpu.multi_processor_count,
        "capability": f"{gpu.major}.{gpu.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **dict(zip(asked, answer.split(", "), strict=False)),
    }
