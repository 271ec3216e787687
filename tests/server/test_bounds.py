"""What costs time is bounded before it is begun, and not begun for a client that has left."""

import gc
import json
import threading

import pytest
from scripted_engine import CONTEXT
from serve_world import World, body, error_of, running
from test_limits import counted, raw_request
from waiting import DEADLINE, until

from mis_jax.server import protocol
from mis_jax.server.protocol import ApiError

CHAT = "/v1/chat/completions"
TURN = {"role": "user", "content": ""}
PART = {"type": "text", "text": ""}


@pytest.fixture
def refused(world: World, monkeypatch):
    """The error of a request that must not reach the tokenizer."""

    def tokenised(*_, **__):
        raise AssertionError("it was tokenised")

    def refused(**fields) -> dict:
        monkeypatch.setattr(world.engine.processor, "render", tokenised)
        return error_of(world.http.post(CHAT, json=body() | fields), 400)

    return refused


@pytest.mark.parametrize(
    "fields",
    [
        dict(system_prompt="a" * 3_000_000),
        dict(messages=[{"role": "system", "content": "a" * 3_000_000}, TURN]),
        dict(messages=[{"role": "user", "content": "a" * 3_000_000}]),
        dict(messages=[{"role": "user", "content": [PART | {"text": "a" * 100}] * 300}]),
        dict(messages=[TURN] * 100_000),
        dict(messages=[TURN] * (CONTEXT // 3 + 1)),
        dict(system_prompt="a" * 20_000, messages=[{"role": "user", "content": "a" * 20_000}]),
    ],
)  # fmt: skip
def test_every_field_that_becomes_tokens_passes_one_bound(refused, fields):
    assert refused(**fields)["code"] == "context_length_exceeded"


def test_stop_strings_are_bounded(refused):
    assert "at most 1024 characters" in refused(stop="b" * 3_000_000)["message"]
    assert refused(stop=["a", "b" * 3_000_000])["param"] == "stop[1]"
    assert "at most 4" in refused(stop=list("abcde"))["message"]


def test_turns_and_parts_are_counted_before_they_are_checked_one_by_one(refused, monkeypatch):
    """A million of them hold the interpreter, and so every client, for seconds."""

    def checked(content):
        raise AssertionError("they were checked")

    monkeypatch.setattr(protocol.ChatRequest, "model_validate", checked)
    for messages in ([TURN] * 100_000, [{"role": "user", "content": [PART] * 100_000}]):
        assert refused(messages=messages)["code"] == "context_length_exceeded"


def test_json_of_brackets_alone_is_not_parsed(world, monkeypatch):
    def parsed(*_, **__):
        raise AssertionError("it was parsed")

    monkeypatch.setattr(protocol, "from_json", parsed)
    content = b'{"model": [' + b"[]," * 1_000_000 + b"[]]}"
    response = world.http.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    assert error_of(response, 400)["code"] == "context_length_exceeded"


def test_an_error_does_not_send_a_long_field_back(world):
    long = "x" * 1_000_000
    for status, fields in ((404, {"model": long}), (400, {long: 1})):
        response = world.http.post(CHAT, json=body() | fields)
        error_of(response, status)
        assert len(response.content) < 5000


class Gate:
    """Holds up the making of prompts; `made` has the texts that it was begun for."""

    def __init__(self, processor, monkeypatch):
        self.made: list[str] = []
        self.open = threading.Event()
        real = processor.render

        def render(messages, *words, **more):
            self.made.append(messages[-1]["content"][-1]["text"])
            assert self.open.wait(DEADLINE)
            return real(messages, *words, **more)

        monkeypatch.setattr(processor, "render", render)


def test_a_prompt_whose_client_has_left_is_not_begun(tiny_processor, monkeypatch):
    gate = Gate(tiny_processor, monkeypatch)
    with running(tiny_processor, workers=1) as world:
        first = raw_request(world, json.dumps(body("first")).encode())
        until(lambda: gate.made == ["first"])
        left = raw_request(world, json.dumps(body("left")).encode())
        until(lambda: world.service.waiting == 2)
        left.close()
        until(lambda: counted(world, 499) == 1)  # at once, not when its turn has come
        assert world.service.waiting == 1
        gate.open.set()
        assert b"200 OK" in first.recv(100)
        first.close()
        assert world.ask("last").status_code == 200
        assert gate.made == ["first", "last"]


def test_a_client_that_leaves_while_its_prompt_is_made_frees_its_place(tiny_processor, monkeypatch):
    gate = Gate(tiny_processor, monkeypatch)
    with running(tiny_processor, workers=1) as world:
        left = raw_request(world, json.dumps(body("left")).encode())
        until(lambda: gate.made == ["left"])
        left.close()
        until(lambda: counted(world, 499) == 1)
        assert world.service.waiting == 0
        gate.open.set()
        assert world.ask("last").status_code == 200
        assert world.engine.next == 1  # the engine has heard of the last alone


def test_the_server_answers_others_while_prompts_are_made(tiny_processor, monkeypatch):
    gate = Gate(tiny_processor, monkeypatch)
    with running(tiny_processor, workers=1) as world:
        raw = raw_request(world, json.dumps(body("slow")).encode())
        until(lambda: gate.made == ["slow"])
        assert world.http.get("/health").json()["waiting"] == 1
        gate.open.set()
        assert b"200 OK" in raw.recv(100)
        raw.close()


def test_a_refused_request_leaves_nothing_that_waits_for_a_collection(tiny_processor):
    """Errors whose frames hold them held every body until then: gigabytes under load."""
    with running(tiny_processor) as world:
        gc.collect()
        gc.disable()
        try:
            for _ in range(3):
                refused = world.http.post(CHAT, json=body(system_prompt="x " * (1 << 20)))
                assert refused.status_code == 400
            until(lambda: not [o for o in gc.get_objects() if isinstance(o, ApiError)])
        finally:
            gc.enable()
