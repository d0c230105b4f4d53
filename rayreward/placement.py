"""How many actors, and what each one reserves: decided from the settings and the machines.

Pure; knows machines as numbers, not Ray.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rayreward.config import PoolConfig
from rayreward.errors import PlacementError


@dataclass(frozen=True, slots=True)
class Machine:
    """What one machine of the cluster has in all."""

    cpus: float
    gpus: float


@dataclass(frozen=True, slots=True)
class Placement:
    """What to ask the cluster for."""

    num_actors: int
    num_cpus: float
    """Reserved by each actor."""
    num_gpus: float
    """Reserved by each actor; 0 means that it can touch none."""
    threads: int
    """torch threads in each actor: the same everywhere, since bits can depend on it."""

    def __str__(self) -> str:
        gpus = f" and {self.num_gpus:g} GPU" if self.num_gpus else ""
        actors = "1 actor" if self.num_actors == 1 else f"{self.num_actors} actors"
        return f"{actors} with {self.num_cpus:g} CPU{gpus} each"


def place(config: PoolConfig, machines: Sequence[Machine]) -> Placement:
    """Decides how the pool spreads over the cluster.

    Raises:
        PlacementError: num_actors is "auto" and the cluster has nothing to count.
    """
    gpus_wanted = config.num_gpus_per_actor
    if gpus_wanted is None:
        gpus_wanted = 1.0 if any(machine.gpus for machine in machines) else 0.0
    if gpus_wanted:
        return _on_gpus(config, machines, gpus_wanted)
    return _on_cpus(config, [machine for machine in machines if machine.cpus])


def _on_gpus(config: PoolConfig, machines: Sequence[Machine], gpus: float) -> Placement:
    actors = config.num_actors
    if actors == "auto":
        # a share never spans two GPUs; 1 / 0.01 is a little under 100
        per_gpu = math.floor(1 / gpus + 1e-9)
        actors = sum(math.floor(machine.gpus) * per_gpu for machine in machines)
        if not actors:
            raise PlacementError(_nothing("GPU"))
    cpus = config.num_cpus_per_actor or 1.0
    return Placement(actors, cpus, gpus, max(1, int(cpus)))


def _on_cpus(config: PoolConfig, machines: Sequence[Machine]) -> Placement:
    actors = config.num_actors
    if actors == "auto":
        actors = len(machines)
        if not actors:
            raise PlacementError(_nothing("CPU"))
    cpus = config.num_cpus_per_actor
    if cpus is None:
        smallest = min((machine.cpus for machine in machines), default=1.0)
        share = smallest / math.ceil(actors / max(1, len(machines)))
        # rounded down, so that all of them fit: to whole cores, or to hundredths of one
        cpus = float(math.floor(share)) if share >= 1 else max(math.floor(share * 100), 1) / 100
    return Placement(actors, cpus, 0.0, max(1, int(cpus)))


def _nothing(kind: str) -> str:
    return (
        f"The cluster has no {kind} to count, so num_actors='auto' is none. Where machines start "
        "on demand, say num_actors, num_gpus_per_actor and a longer placement_timeout_s."
    )
