"""placement: how many actors, and what each one reserves."""

from __future__ import annotations

from typing import Any

import pytest

from rayreward.config import PoolConfig
from rayreward.errors import PlacementError
from rayreward.placement import Machine, Placement, place

GPU_MACHINE = Machine(cpus=16, gpus=4)
CPU_MACHINE = Machine(cpus=8, gpus=0)


def _place(*machines: Machine, **settings: Any) -> Placement:
    return place(PoolConfig(**settings), machines)


def test_placement_auto_takes_one_actor_per_gpu() -> None:
    placed = _place(GPU_MACHINE, CPU_MACHINE, Machine(cpus=4, gpus=1))
    assert placed == Placement(num_actors=5, num_cpus=1.0, num_gpus=1.0, threads=1)


def test_placement_auto_takes_one_actor_per_machine_without_gpus() -> None:
    placed = _place(CPU_MACHINE, CPU_MACHINE, CPU_MACHINE)
    assert placed == Placement(num_actors=3, num_cpus=8.0, num_gpus=0.0, threads=8)


def test_placement_gives_every_actor_what_the_smallest_machine_has() -> None:
    assert _place(Machine(cpus=32, gpus=0), Machine(cpus=6, gpus=0)).num_cpus == 6.0


def test_placement_leaves_gpus_alone_where_told() -> None:
    placed = _place(GPU_MACHINE, CPU_MACHINE, num_gpus_per_actor=0)
    assert placed == Placement(num_actors=2, num_cpus=8.0, num_gpus=0.0, threads=8)


def test_placement_does_not_count_machines_without_cores() -> None:
    assert _place(Machine(cpus=0, gpus=0), CPU_MACHINE).num_actors == 1


@pytest.mark.parametrize(
    ("share", "gpus", "actors"),
    [(0.5, [4, 1], 10), (0.25, [1], 4), (0.1, [1], 10), (0.4, [2], 4), (0.75, [4], 4)],
)
def test_placement_auto_packs_shares_into_whole_gpus(
    share: float, gpus: list[int], actors: int
) -> None:
    machines = [Machine(cpus=64, gpus=number) for number in gpus]
    placed = _place(*machines, num_gpus_per_actor=share)
    assert (placed.num_actors, placed.num_gpus) == (actors, share)


def test_placement_takes_the_number_of_actors_as_given() -> None:
    assert _place(GPU_MACHINE, num_actors=3).num_actors == 3
    assert _place(CPU_MACHINE, num_actors=3).num_actors == 3
    assert _place(num_actors=3, num_gpus_per_actor=1).num_actors == 3


@pytest.mark.parametrize(
    ("actors", "machines", "cpus", "threads"),
    [
        (2, [8], 4.0, 4),
        (3, [8], 2.0, 2),
        (3, [8, 8], 4.0, 4),
        (4, [2], 0.5, 1),
        (3, [1], 0.33, 1),
        (1, [0.5], 0.5, 1),
        (3, [], 0.33, 1),
    ],
)
def test_placement_shares_the_cores_so_that_all_actors_fit(
    actors: int, machines: list[float], cpus: float, threads: int
) -> None:
    placed = _place(*(Machine(cpus=number, gpus=0) for number in machines), num_actors=actors)
    assert placed == Placement(actors, cpus, 0.0, threads)


@pytest.mark.parametrize(("cpus", "threads"), [(0.5, 1), (2.5, 2), (6, 6)])
@pytest.mark.parametrize("machine", [GPU_MACHINE, CPU_MACHINE])
def test_placement_takes_the_cores_as_given(machine: Machine, cpus: float, threads: int) -> None:
    placed = _place(machine, num_cpus_per_actor=cpus)
    assert (placed.num_cpus, placed.threads) == (cpus, threads)


@pytest.mark.parametrize(
    ("machines", "settings", "kind"),
    [
        ([], {}, "CPU"),
        ([Machine(cpus=0, gpus=0)], {}, "CPU"),
        ([CPU_MACHINE], {"num_gpus_per_actor": 1}, "GPU"),
    ],
)
def test_placement_says_what_to_set_where_there_is_nothing_to_count(
    machines: list[Machine], settings: dict[str, Any], kind: str
) -> None:
    with pytest.raises(PlacementError) as caught:
        _place(*machines, **settings)
    message = str(caught.value)
    assert f"The cluster has no {kind} to count" in message
    assert "say num_actors, num_gpus_per_actor and a longer placement_timeout_s" in message


@pytest.mark.parametrize(
    ("placed", "text"),
    [
        (Placement(4, 1.0, 1.0, 1), "4 actors with 1 CPU and 1 GPU each"),
        (Placement(8, 0.5, 0.25, 1), "8 actors with 0.5 CPU and 0.25 GPU each"),
        (Placement(2, 8.0, 0.0, 8), "2 actors with 8 CPU each"),
    ],
)
def test_placement_reads_as_a_sentence(placed: Placement, text: str) -> None:
    assert str(placed) == text
