"""Requests of many threads at one engine: who is let in, who hears what, when a place is free."""

import queue
import threading
from types import SimpleNamespace

import pytest
from scripted_engine import CONTEXT, FAIL, ScriptedEngine
from waiting import DEADLINE, until

from mis_jax.inference.async_engine import Busy, EngineFailure, Service, Unavailable
from mis_jax.inference.requests import Request, RequestOutput
from mis_jax.inference.sampling import Sampling
from mis_jax.server.run import warm_up


@pytest.fixture
def ask(tiny_processor):
    """A request of one user message."""

    def make(text: str = "hello", max_new_tokens: int = 100) -> Request:
        example = tiny_processor.example([{"role": "user", "content": text}])
        return Request(example, max_new_tokens=max_new_tokens, sampling=Sampling())

    return make


@pytest.fixture
def open_service(tiny_processor):
    services = []

    def make(rows: int = 2, max_queue: int = 3) -> SimpleNamespace:
        engine = ScriptedEngine(tiny_processor, rows)
        services.append(Service(engine, max_concurrent=rows, max_queue=max_queue))
        return SimpleNamespace(engine=engine, service=services[-1])

    yield make
    for service in services:
        service.close()


class Heard:
    """What one request is told, until its end."""

    def __init__(self):
        self._told: queue.Queue[RequestOutput | Exception] = queue.Queue()
        self.hear = self._told.put

    def answer(self) -> str:
        text = ""
        while True:
            what = self._told.get(timeout=DEADLINE)
            if isinstance(what, Exception):
                raise what
            text += what.text
            if what.finish_reason:
                assert self._told.empty()
                return text

    @property
    def silent(self) -> bool:
        return self._told.empty()


def test_every_thread_gets_its_own_answer(open_service, ask):
    world = open_service(rows=3, max_queue=100)
    answers: dict[int, str] = {}

    def client(number: int) -> None:
        for turn in range(4):
            heard = Heard()
            world.service.submit(ask(f"number {number} turn {turn}"), heard.hear)
            answers[4 * number + turn] = heard.answer()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    expected = {
        4 * n + turn: f"0 tiles: number {n} turn {turn}" for n in range(16) for turn in range(4)
    }
    assert answers == expected
    assert (world.service.running, world.service.waiting) == (0, 0)


def test_exactly_so_many_run_and_wait(open_service, ask):
    world = open_service(rows=2, max_queue=3)
    service = world.service
    world.engine.gate.clear()
    heard = [Heard() for _ in range(5)]
    tickets = [service.submit(ask(f"n {n}"), h.hear) for n, h in enumerate(heard)]
    for _ in range(3):
        with pytest.raises(Busy, match="5 requests are running or waiting"):
            service.submit(ask(), Heard().hear)
    until(lambda: service.running == 2)
    assert service.waiting == 3
    tickets[4].cancel()  # one that waits
    until(lambda: service.waiting == 2)
    tickets[0].cancel()  # one that runs: the next in the queue takes its row
    until(lambda: service.waiting == 1)
    assert service.running == 2
    late = [Heard(), Heard()]
    for hearer in late:
        service.submit(ask("late"), hearer.hear)
    with pytest.raises(Busy):
        service.reserve()
    world.engine.gate.set()
    assert [heard[n].answer() for n in (1, 2, 3)] == [f"0 tiles: n {n}" for n in (1, 2, 3)]
    assert {hearer.answer() for hearer in late} == {"0 tiles: late"}
    assert heard[0].silent and heard[4].silent
    assert (service.running, service.waiting) == (0, 0)


def test_a_reserved_place_counts_until_it_is_given_back(open_service, ask):
    service = open_service(rows=1, max_queue=1).service
    places = [service.reserve(), service.reserve()]
    assert (service.running, service.waiting) == (0, 2)
    with pytest.raises(Busy):
        service.reserve()
    places[0].cancel()
    places[0].cancel()
    heard = Heard()
    service.submit(ask(), heard.hear)
    assert heard.answer() == "0 tiles: hello"
    assert service.waiting == 1


def test_a_place_is_free_when_the_last_piece_is_heard(open_service, ask):
    service = open_service(rows=1, max_queue=0).service
    for turn in range(50):  # a race would show
        heard = Heard()
        service.submit(ask(f"turn {turn}"), heard.hear)
        assert heard.answer() == f"0 tiles: turn {turn}"


def test_a_request_that_can_never_run_is_told_so_and_harms_nobody(open_service, ask):
    service = open_service().service
    too_long, fine = Heard(), Heard()
    service.submit(ask(max_new_tokens=CONTEXT), too_long.hear)
    service.submit(ask(), fine.hear)
    with pytest.raises(ValueError, match="exceed the context"):
        too_long.answer()
    assert fine.answer() == "0 tiles: hello"
    with pytest.raises(ValueError, match="exceed the context"):
        service.check(ask(max_new_tokens=CONTEXT))


def test_a_failure_of_the_engine_reaches_everybody(open_service, ask):
    world = open_service()
    world.engine.gate.clear()
    heard = [Heard() for _ in range(4)]
    for hearer in heard[:3]:
        world.service.submit(ask(), hearer.hear)
    place = world.service.reserve()
    world.service.submit(ask(FAIL), heard[3].hear)
    for hearer in heard:
        with pytest.raises(EngineFailure, match="a secret of the device"):
            hearer.answer()
    assert world.service.broken
    assert (world.service.running, world.service.waiting) == (0, 0)
    with pytest.raises(Unavailable, match="the engine has failed"):
        world.service.reserve()
    late = Heard()
    place.start(ask(), late.hear)  # its place was taken before
    with pytest.raises(Unavailable, match="the engine has failed"):
        late.answer()


def test_draining_finishes_what_runs_and_waits(open_service, ask):
    world = open_service(rows=1, max_queue=2)
    world.engine.gate.clear()
    heard = [Heard() for _ in range(3)]
    for hearer in heard:
        world.service.submit(ask(), hearer.hear)
    assert not world.service.drain(0.02)
    with pytest.raises(Unavailable, match="shutting down"):
        world.service.reserve()
    world.engine.gate.set()
    assert world.service.drain(5)
    assert [hearer.answer() for hearer in heard] == ["0 tiles: hello"] * 3


def test_closing_tells_those_who_wait(open_service, ask):
    world = open_service(rows=1)
    world.engine.gate.clear()
    heard = [Heard(), Heard()]
    for hearer in heard:
        world.service.submit(ask(), hearer.hear)
    world.service.close()
    for hearer in heard:
        with pytest.raises(Unavailable, match="shutting down"):
            hearer.answer()


def test_a_hearer_that_fails_loses_its_place_alone(open_service, ask):
    world = open_service(rows=1, max_queue=1)

    def deaf(what):
        raise RuntimeError("the event loop is closed")

    fine = Heard()
    world.service.submit(ask("deaf " * 10), deaf)
    world.service.submit(ask(), fine.hear)
    assert fine.answer() == "0 tiles: hello"
    assert world.engine.cancelled == [1]
    assert world.service.running == 0


def test_warming_up_raises_what_the_engine_raises(open_service, tiny_processor, monkeypatch):
    world = open_service()
    warm_up(world.service, tiny_processor)
    assert world.engine.next == 2
    assert (world.service.running, world.service.waiting) == (0, 0)

    def full():
        raise MemoryError("the device is full")

    monkeypatch.setattr(world.engine, "step", full)
    with pytest.raises(EngineFailure, match="the device is full"):
        warm_up(world.service, tiny_processor)
