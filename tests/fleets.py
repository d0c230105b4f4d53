"""A dispatcher's surroundings, scripted: a fleet, a gate, and tasks."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from rayreward.dispatch import Dispatcher
from rayreward.errors import DeterminismError
from rayreward.events import Born, Done, Event, Failed, Lost, Task


class FakeFleet:
    """Actors that answer each task with its key, one task a turn, until told otherwise."""

    def __init__(self, kill: Callable[[int, Task], bool] = lambda actor, task: False) -> None:
        self.kill = kill
        self.start_with: dict[int, list[Event]] = {}
        self.started: list[int] = []
        self.stopped: list[int] = []
        self.ran: list[tuple[int, int]] = []
        self.most_in_flight = 0
        self.prove_every = 10**9
        self._since_proof: Counter[int] = Counter()
        self._events: deque[Event] = deque()
        self._beginnings: list[Event] = []
        self._queues: dict[int, deque[tuple[int, Task]]] = {}
        self._tickets = 0
        self.hangs: Callable[[int, Task], bool] = lambda actor, task: False
        self.together: list[set[int]] = []
        self.never_ready: set[int] = set()

    def happen(self, event: Event) -> None:
        """Something comes about that nobody asked for."""
        self._events.append(event)

    def start(self, actor: int) -> None:
        self.started.append(actor)
        scripted = self.start_with.get(actor)
        if actor not in self.never_ready:
            self._beginnings.append(scripted.pop(0) if scripted else Born(actor, f"birth {actor}"))
        self._queues[actor] = deque()

    def submit(self, actor: int, task: Task) -> int:
        self._tickets += 1
        self._queues[actor].append((self._tickets, task))
        self.most_in_flight = max(self.most_in_flight, len(self._queues[actor]))
        return self._tickets

    def wait(self, timeout_s: float) -> list[Event]:
        for actor, queue in self._queues.items():
            if queue:
                self._turn(actor, queue)
        events = [*self._events, *self._beginnings]
        self._events.clear()
        self._beginnings.clear()
        return events

    def forget(self, ticket: int) -> None:
        for queue in self._queues.values():
            for item in list(queue):
                if item[0] == ticket:
                    queue.remove(item)

    def stop(self, actor: int) -> None:
        self.stopped.append(actor)
        self._queues.pop(actor, None)

    def _turn(self, actor: int, queue: deque[tuple[int, Task]]) -> None:
        ticket, task = queue[0]
        self.together.append({task.key for _, task in queue})
        if self.hangs(actor, task):
            return
        if self.kill(actor, task):
            queue.clear()
            self._events.append(Lost(actor, "killed."))
            return
        queue.popleft()
        self.ran.append((actor, task.key))
        if task.method == "fail":
            self._events.append(Failed(ticket, ValueError("bad task")))
            return
        self._since_proof[actor] += 1
        due = task.method == "prove" or self._since_proof[actor] >= self.prove_every
        if due:
            self._since_proof[actor] = 0
        self._events.append(Done(ticket, task.key, "proof" if due else None))


class FakeGate:
    """Admits everybody and finds every proof good, until told otherwise."""

    def __init__(
        self,
        admit: Callable[[int, Any], bool] = lambda actor, birth: True,
        confirm: Callable[[int, Any], None] = lambda actor, proof: None,
    ) -> None:
        self.admit = admit
        self.confirm = confirm


def refuse(*_: Any) -> Any:
    raise DeterminismError("another model", None)  # type: ignore[arg-type]


def dispatcher(
    fleet: FakeFleet, num_actors: int = 2, gate: FakeGate | None = None, **settings: Any
) -> Dispatcher:
    defaults: dict[str, Any] = {
        "num_actors": num_actors,
        "tasks_per_actor": 2,
        "max_attempts": 3,
    }
    return Dispatcher(fleet, gate or FakeGate(), **{**defaults, **settings})


def kill_once(victim: int, over: int | None = None) -> Callable[[int, Task], bool]:
    """Kills one actor over its first task, or over that of a number."""
    died: list[int] = []

    def kill(actor: int, task: Task) -> bool:
        if actor == victim and not died and over in (None, task.key):
            died.append(actor)
            return True
        return False

    return kill


def tasks(count: int) -> list[Task]:
    return [Task(key, f"Shard {key}", "work", ()) for key in range(count)]


def run(subject: Dispatcher, count: int) -> list[int]:
    return [result.value for result in subject.run(tasks(count)) if result.proven is None]
