"""The service thread with a scripted fleet: who is answered what, whatever happens to actors."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rayreward.dispatch import Dispatcher
from rayreward.errors import ModelError, PoolBusyError, PoolClosedError, PoolError
from rayreward.events import Born, Done, Event, Failed, Lost, NotLoaded, Task
from rayreward.merging import Canceled, Request, RequestQueue
from rayreward.service import POISON, Service
from rayreward.types import Reward, Text

PATIENCE_S = 20.0


class ScoringFleet:
    """Actors whose reward of a text is its length, and who die or fail over some."""

    def __init__(self) -> None:
        self.deadly = ""
        self.wrong = ""
        self.version = 0
        self.started: list[int] = []
        self.batches: list[list[str]] = []
        self.open = threading.Event()
        self.open.set()
        self.broken: list[BaseException] = []
        self._events: deque[Event] = deque()
        self._waiting: deque[tuple[int, int, Task]] = deque()
        self._tickets = itertools.count()

    def start(self, actor: int) -> None:
        self.started.append(actor)
        error = self.broken.pop() if self.broken else None
        self._events.append(NotLoaded(actor, error) if error else Born(actor, actor))

    def submit(self, actor: int, task: Task) -> int:
        ticket = next(self._tickets)
        self._waiting.append((ticket, actor, task))
        return ticket

    def wait(self, timeout_s: float) -> list[Event]:
        if self.open.wait(timeout_s) and self._waiting:
            self._score(*self._waiting.popleft())
        events = [*self._events]
        self._events.clear()
        return events

    def _score(self, ticket: int, actor: int, task: Task) -> None:
        [groups] = task.args
        texts = [sample.completion for group in groups for sample in group]
        self.batches.append(texts)
        if self.deadly and self.deadly in texts:
            self._waiting = deque(item for item in self._waiting if item[1] != actor)
            self._events.append(Lost(actor, "killed."))
        elif self.wrong and self.wrong in texts:
            self._events.append(Failed(ticket, ModelError("no chat template")))
        else:
            value = [[Reward(len(s.completion), self.version, False) for s in g] for g in groups]
            self._events.append(Done(ticket, value))

    def forget(self, ticket: int) -> None:
        self._waiting = deque(item for item in self._waiting if item[0] != ticket)

    def stop(self, actor: int) -> None:
        self._waiting = deque(item for item in self._waiting if item[1] != actor)


class OpenGate:
    def admit(self, actor: int, birth: Any) -> bool:
        return True

    def confirm(self, actor: int, proof: Any) -> None: ...


class Subject:
    """A service with its fleet, and requests that can be waited for."""

    def __init__(self, num_actors: int = 1, max_rows: int = 10_000) -> None:
        self.fleet = ScoringFleet()
        dispatcher = Dispatcher(
            self.fleet, OpenGate(), num_actors=num_actors, tasks_per_actor=2, max_attempts=3
        )
        dispatcher.start()
        queue = RequestQueue(max_rows=max_rows, rows_per_task=8, max_wait_s=0.05)
        self.service = Service(dispatcher, queue, max_attempts=3)
        self._answered: dict[Request, threading.Event] = {}

    def ask(self, caller: str, *texts: str) -> Request:
        request = Request(caller, [[Text("", text)] for text in texts], self._note)
        self._answered[request] = threading.Event()
        self.service.submit(request)
        return request

    def _note(self, request: Request) -> None:
        self._answered[request].set()

    def answer(self, request: Request) -> list[Any]:
        assert self._answered[request].wait(PATIENCE_S), "no answer"
        if request.error is not None:
            raise request.error
        return [outcome for group in request.outcomes for outcome in group]


Make = Callable[..., Subject]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Subject] = []

    def subject(**settings: Any) -> Subject:
        made.append(Subject(**settings))
        return made[-1]

    yield subject
    for item in made:
        item.fleet.open.set()
        item.service.close(PATIENCE_S)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def values(outcomes: list[Any]) -> list[float]:
    return [outcome.value for outcome in outcomes]


def test_requests_of_two_callers_are_scored_together(make: Make) -> None:
    subject = make()
    subject.fleet.open.clear()
    busy = subject.ask("a", *["x"] * 16)  # as many as the actor takes at once
    wait_until(lambda: not subject.service.rows_waiting)
    first, second = subject.ask("a", "aa", "aaa"), subject.ask("b", "b")
    subject.fleet.open.set()
    assert values(subject.answer(first)) == [2, 3]
    assert values(subject.answer(second)) == [1]
    assert len(subject.answer(busy)) == 16
    assert sorted(subject.fleet.batches[-1]) == ["aa", "aaa", "b"]


def test_a_text_that_kills_gets_no_reward_and_those_beside_it_get_theirs(make: Make) -> None:
    subject = make(num_actors=2)
    subject.fleet.deadly = "KILL"
    others = subject.ask("b", "b", "bb", "bbb")
    request = subject.ask("a", "a", "KILL", "aaa")
    found = subject.answer(request)
    assert found[1] == POISON
    assert values(found[::2]) == [1, 3]
    assert values(subject.answer(others)) == [1, 2, 3]


def test_one_text_of_a_group_that_kills_is_told_from_the_others(make: Make) -> None:
    subject = make()
    subject.fleet.deadly = "KILL"
    group = [Text("", text) for text in ("a", "aa", "KILL", "aaaa", "aaaaa")]
    request = Request("a", [group], subject._note)
    subject._answered[request] = threading.Event()
    subject.service.submit(request)
    found = subject.answer(request)
    assert found[2] == POISON
    assert values(found[:2] + found[3:]) == [1, 2, 4, 5]


def test_an_error_is_for_the_request_that_it_is_of(make: Make) -> None:
    subject = make()
    subject.fleet.wrong = "chat"
    good, bad = subject.ask("a", "a"), subject.ask("b", "chat")
    with pytest.raises(ModelError, match="no chat template"):
        subject.answer(bad)
    assert values(subject.answer(good)) == [1]


def test_no_request_sees_two_versions(make: Make) -> None:
    subject = make()
    subject.fleet.open.clear()
    before = [subject.ask("a", *["x"] * 40), subject.ask("b", *["y"] * 40)]
    wait_until(lambda: subject.service.rows_waiting < 80)

    def exchange() -> None:
        subject.fleet.version += 1

    exchanged = subject.service.between(exchange)
    after = subject.ask("c", "z")
    subject.fleet.open.set()
    exchanged.result(PATIENCE_S)
    for request in [*before, after]:
        assert len({outcome.tokens for outcome in subject.answer(request)}) == 1
    assert {outcome.tokens for outcome in subject.answer(after)} == {1}


def test_what_a_call_in_between_raises_is_its_callers(make: Make) -> None:
    subject = make()

    def fail() -> None:
        raise PoolError("not now")

    with pytest.raises(PoolError, match="not now"):
        subject.service.between(fail).result(PATIENCE_S)
    assert values(subject.answer(subject.ask("a", "a"))) == [1]


def test_a_request_that_is_taken_back_is_not_scored(make: Make) -> None:
    subject = make()
    subject.fleet.open.clear()
    busy = subject.ask("a", *["x"] * 16)
    wait_until(lambda: not subject.service.rows_waiting)
    unwanted = subject.ask("b", "unwanted")
    subject.service.cancel(unwanted)
    with pytest.raises(Canceled):
        subject.answer(unwanted)
    subject.fleet.open.set()
    subject.answer(busy)
    subject.answer(subject.ask("c", "c"))
    assert ["unwanted"] not in subject.fleet.batches


def test_a_full_queue_refuses(make: Make) -> None:
    subject = make(max_rows=20)
    subject.fleet.open.clear()
    requests = [subject.ask("a", *["x"] * 16)]
    wait_until(lambda: not subject.service.rows_waiting)  # the actor has them
    requests += [subject.ask("b", *["y"] * 16)]
    with pytest.raises(PoolBusyError):
        subject.ask("c", *["z"] * 16)
    subject.fleet.open.set()
    for request in requests:
        subject.answer(request)


def test_where_no_actor_is_left_requests_fail_and_later_ones_are_served(make: Make) -> None:
    subject = make()
    subject.fleet.deadly = "KILL"
    subject.fleet.broken = [ModelError("the disk is gone")]
    with pytest.raises(ModelError, match="the disk is gone"):
        subject.answer(subject.ask("a", "KILL"))
    subject.fleet.deadly = ""
    assert values(subject.answer(subject.ask("a", "a"))) == [1]


def test_an_actor_that_can_not_be_brought_up_is_done_without(make: Make) -> None:
    subject = make(num_actors=2)
    subject.fleet.deadly = "KILL"
    subject.fleet.broken = [ModelError("the disk is gone")]
    request = subject.ask("a", "KILL", "a")
    found = subject.answer(request)
    assert found[0] == POISON
    assert found[1].value == 1


def test_close_answers_what_is_there_and_takes_no_more(make: Make) -> None:
    subject = make()
    requests = [subject.ask("a", *["x"] * 30) for _ in range(3)]
    subject.service.close()
    for request in requests:
        assert len(subject.answer(request)) == 30
    with pytest.raises(PoolClosedError):
        subject.ask("a", "x")


def test_close_in_a_hurry_answers_the_rest_with_an_error(make: Make) -> None:
    subject = make()
    subject.fleet.open.clear()
    request = subject.ask("a", *["x"] * 30)
    subject.service.close(timeout_s=0.1)
    with pytest.raises(PoolClosedError, match="before this was scored"):
        subject.answer(request)
