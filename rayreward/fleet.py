"""The border to Ray: connecting to a cluster, bringing actors up, and telling what became of them.

All of Ray's ways to fail are turned into the dispatcher's events here, and nowhere else. Does not
know what the tasks are or what to do about a failure.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayreward import signals
from rayreward.actor import HeadState, RewardActor, Worked
from rayreward.allocator import ONE_ARENA
from rayreward.config import ModelConfig, PoolConfig
from rayreward.events import Alive, Born, Done, Event, Failed, Lost, NotLoaded, NotPlaced, Task
from rayreward.placement import Machine, Placement

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

Ref: TypeAlias = "ray.ObjectRef[Any]"

_PULSE_EVERY_S = 5.0
"""How often a busy actor is asked whether it gets on."""

_UNREACHABLE_S = 30.0
"""How long an actor that can't be reached may yet turn out to have died with its machine."""

_NICENESS = "RAY_worker_niceness"
"""Ray's own setting, for who wants it otherwise."""

_ASIDE, _BESIDE = "aside", "beside"
"""Calls of these groups are answered beside whatever the actor is doing: short ones, and long."""


class RayConnection:
    """The link to a Ray cluster. Ends what it began, and nothing that it found."""

    def __init__(self, address: str | None = None) -> None:
        """
        Args:
            address: As in `PoolConfig.ray_address`.
        """
        self._owned = not ray.is_initialized()
        if self._owned:
            # Never whatever cluster was last started on this machine: a stale record of it would
            # be taken up without a word.
            address = address or os.environ.get("RAY_ADDRESS") or "local"
            ray.init(address=address, configure_logging=False, **_local_options(address))
        signals.rearm()

    def machines(self, placement_group: PlacementGroup | None = None) -> list[Machine]:
        """The machines that are alive now, with what each has in all.

        Args:
            placement_group: Whose bundles to take for machines instead.
        """
        if placement_group is not None:
            bundles = placement_group.bundle_specs
            return [Machine(b.get("CPU", 0.0), b.get("GPU", 0.0)) for b in bundles]
        return [
            Machine(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
            for node in ray.nodes()
            if node["Alive"]
        ]

    def close(self) -> None:
        """Leaves Ray, if this object entered it. Safe to call again."""
        if self._owned and ray.is_initialized():
            ray.shutdown()
        self._owned = False


def _local_options(address: str) -> dict[str, Any]:
    """A private cluster needs no dashboard, and its actors are as urgent as who waits for them.

    Ray lets whatever else runs on a machine go before its actors. That is its owner's choice in a
    cluster that was found; beside other work on a laptop nothing would be scored for minutes.
    """
    if address != "local":
        return {}
    niceness = {} if _NICENESS in os.environ else {"worker_niceness": 0}
    return {"include_dashboard": False, "_system_config": niceness}


class RayFleet:
    """Reward actors in a Ray cluster. Implements `rayreward.dispatch.Fleet`.

    Attributes:
        handles: The actors by number.
        model: What actors that are started from now on load.
        head: What actors that are started from now on hold as their head; null: what they draw.
    """

    def __init__(
        self,
        model: ModelConfig,
        placement: Placement,
        pool: PoolConfig,
        placement_group: PlacementGroup | None = None,
    ) -> None:
        """
        Args:
            model: What the actors load.
            placement: What each one reserves.
            pool: How long one may wait for its place, and how often it looks at its weights.
            placement_group: Reserved by the caller: the actors live in it.
        """
        self._placement = placement
        self._timeout_s = pool.placement_timeout_s
        self._load_timeout_s = pool.silent_after_s
        self._args = (placement.threads, placement.num_gpus > 0, pool.recheck_share)
        grouped: Any = ray.remote(concurrency_groups={_ASIDE: 1, _BESIDE: 1})  # type: ignore[call-overload]
        self._class: Any = grouped(RewardActor)
        self._options: dict[str, Any] = {
            "num_cpus": placement.num_cpus,
            "num_gpus": placement.num_gpus,
            "max_restarts": 0,  # replaced by the dispatcher, which checks the replacement first
            "max_task_retries": 0,
            "max_concurrency": pool.tasks_per_actor,
        }
        if not placement.num_gpus:
            self._options["runtime_env"] = {"env_vars": ONE_ARENA}
        if pool.label_selector:
            self._options["label_selector"] = dict(pool.label_selector)
        if placement_group is not None:
            self._options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(placement_group)
        self.model = model
        self.handles: dict[int, Any] = {}
        self.head: HeadState | None = None
        self._deadline: dict[int, float] = {}
        self._placing: dict[Ref, int] = {}
        self._loading: dict[Ref, int] = {}
        self._running: dict[Ref, int] = {}
        self._pulses: dict[Ref, int] = {}
        self._asked: dict[int, float] = {}
        self._node: dict[int, str] = {}
        self._unreachable: dict[int, tuple[str, float]] = {}

    def start(self, actor: int) -> None:
        self._drop(actor)  # calls to an earlier actor of this number are not this one's
        handle = self._class.options(**self._options).remote(self.model, *self._args)
        self.handles[actor] = handle
        self._deadline[actor] = time.monotonic() + self._timeout_s
        self._placing[handle.where.remote()] = actor

    def call_beside(self, actors: Iterable[int], method: str, *args: Any) -> dict[int, Any]:
        """Calls a method on actors, beside whatever they are doing, and waits for all.

        Returns:
            By actor what came of it, or the error: RayActorError where it died.
        """
        refs = {
            actor: getattr(self.handles[actor], method)
            .options(concurrency_group=_BESIDE)
            .remote(*args)
            for actor in actors
        }
        return {actor: _result_or_error(ref) for actor, ref in refs.items()}

    def submit(self, actor: int, task: Task) -> Ref:
        ref: Ref = self.handles[actor].work.remote(task.method, *task.args)
        self._running[ref] = actor
        return ref

    def wait(self, timeout_s: float) -> list[Event]:
        self._ask_for_pulses()
        refs = [*self._placing, *self._loading, *self._running, *self._pulses]
        if refs and ray.wait(refs, num_returns=1, timeout=timeout_s, fetch_local=False)[0]:
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)
            return [*self._events(ready), *self._given_up(), *self._overdue()]
        if not refs:
            time.sleep(timeout_s)
        return [*self._given_up(), *self._overdue()]

    def forget(self, ticket: Ref) -> None:
        self._running.pop(ticket, None)

    def stop(self, actor: int) -> None:
        self._drop(actor)
        handle = self.handles.pop(actor, None)
        if handle is not None:
            with contextlib.suppress(Exception):  # it may be dead already, or Ray itself gone
                ray.kill(handle)

    def _events(self, ready: list[Ref]) -> Iterator[Event]:
        for ref in ready:
            holders = (self._placing, self._loading, self._running, self._pulses)
            actor = next((held[ref] for held in holders if ref in held), None)
            if actor is None:  # its actor was found dead a moment ago
                continue
            try:
                value = ray.get(ref)
            except ActorUnavailableError as error:
                self._drop_calls(actor)
                self._unreachable[actor] = _first_line(error), time.monotonic() + _UNREACHABLE_S
            except RayActorError as error:
                yield self._lost(actor, _first_line(error), preempted=error.preempted)
            except RayTaskError as error:
                yield from self._failed(ref, error.cause)
            else:
                yield from self._succeeded(ref, actor, value)

    def _ask_for_pulses(self) -> None:
        """Asks actors whether they get on, each one call at a time. An idle one may have died."""
        now, asked = time.monotonic(), set(self._pulses.values())
        for actor in self._asked.keys() - asked:
            if now - self._asked[actor] > _PULSE_EVERY_S:
                self._asked[actor] = now
                pulse = self.handles[actor].pulse.options(concurrency_group=_ASIDE).remote()
                self._pulses[pulse] = actor

    def _given_up(self) -> Iterator[Lost]:
        """Which of the actors that can't be reached are lost.

        Ray tells at once that a connection is broken, and seconds later that the machine is gone.
        What was being done is lost in any case: nobody knows how far it came.
        """
        if not self._unreachable:
            return
        alive, now = _machines_alive(), time.monotonic()
        for actor, (reason, deadline) in list(self._unreachable.items()):
            if self._node.get(actor) not in alive or now > deadline:
                with contextlib.suppress(Exception):
                    ray.kill(self.handles[actor])  # a zombie that comes back must not go on
                yield self._lost(actor, reason, preempted=True)

    def _lost(self, actor: int, reason: str, *, preempted: bool) -> Lost:
        """An actor that is no more, and whether its machine went with it, or was taken back."""
        gone = actor in self._node and self._node[actor] not in _machines_alive()
        self._drop(actor)
        return Lost(actor, reason, with_machine=preempted or gone)

    def _succeeded(self, ref: Ref, actor: int, value: Any) -> Iterator[Event]:
        if self._pulses.pop(ref, None) is not None:
            yield Alive(actor, value)
        elif self._placing.pop(ref, None) is not None:
            self._deadline[actor] = time.monotonic() + self._load_timeout_s
            self._node[actor] = value
            self._loading[self.handles[actor].load.remote(self.head)] = actor
        elif self._loading.pop(ref, None) is not None:
            self._deadline.pop(actor, None)
            self._asked[actor] = time.monotonic()
            yield Born(actor, value)
        elif isinstance(value, Worked):
            del self._running[ref]
            yield Done(ref, value.value, value.proof, value.done_s, value.looked_s)

    def _failed(self, ref: Ref, error: BaseException) -> Iterator[Event]:
        if ref in self._loading:
            yield NotLoaded(self._loading.pop(ref), error)
        else:
            del self._running[ref]
            yield Failed(ref, error)

    def _overdue(self) -> Iterator[Event]:
        """Who has not found a place, or not loaded its model, in time."""
        now = time.monotonic()
        for actor, deadline in list(self._deadline.items()):
            if now <= deadline:
                continue
            if actor in self._loading.values():
                self.stop(actor)
                yield Lost(actor, "it did not load its model in time (silent_after_s).")
            else:
                del self._deadline[actor]  # it may still come, when there is room
                yield NotPlaced(actor, self._no_room())

    def _no_room(self) -> str:
        has, free = ray.cluster_resources(), ray.available_resources()
        listed = ", ".join(
            f"{free.get(kind, 0):g} of {has.get(kind, 0):g} {kind} free" for kind in ("CPU", "GPU")
        )
        return (
            f"The cluster found no room for an actor within {self._timeout_s:g} s. Asked for: "
            f"{self._placement}. The cluster has {listed}. Ask for fewer actors or less for each "
            "(num_actors, num_cpus_per_actor, num_gpus_per_actor), free what others hold, or raise "
            "placement_timeout_s if machines are still to come."
        )

    def _drop(self, actor: int) -> None:
        for known in (self._deadline, self._asked, self._node, self._unreachable):
            known.pop(actor, None)
        self._drop_calls(actor)

    def _drop_calls(self, actor: int) -> None:
        for refs in (self._placing, self._loading, self._running, self._pulses):
            for ref in [ref for ref, holder in refs.items() if holder == actor]:
                del refs[ref]


def _result_or_error(ref: Ref) -> Any:
    try:
        return ray.get(ref)
    except RayTaskError as error:
        return error.cause
    except RayActorError as error:
        return error


def _machines_alive() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
