"""A request that the device's memory does not hold ends alone; a broken engine ends the process.

Memory is really exhausted, by 2^48 numbers: what was given away to the failed call is gone.
"""

import functools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scripted_engine import CONTEXT, FAIL
from serve_world import body, data_uri, error_of, image, running, serving
from waiting import DEADLINE

import mis_jax
from mis_jax.cli import main
from mis_jax.cli import serving as serving_verb
from mis_jax.data.collate import Example
from mis_jax.inference import model_runner
from mis_jax.inference.async_engine import EngineFailure
from mis_jax.inference.image_cache import FeaturePool
from mis_jax.inference.memory import OutOfMemory
from mis_jax.inference.requests import Request
from mis_jax.server import run as server_run
from mis_jax.server.run import engine_for

BIG = 250  # tokens that are too many


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint):
    return mis_jax.load(tiny_checkpoint)


@functools.partial(jax.jit, donate_argnums=0)
def _exhaust(given):
    numbers = jnp.arange(1 << 24) + jax.tree.leaves(given)[0].reshape(-1)[0]
    return given, jnp.sort(jnp.outer(numbers, numbers).reshape(1 << 24, -1), axis=0)[0]


def _prompt(words) -> int:
    """Tokens of the longest prompt in a call of prefill."""
    return int(np.max(words[4].prompt))


def exhausted_by(monkeypatch, name: str, too_much, *, at_once: bool) -> None:
    """Calls of this function of the device fail where `too_much` says so of their words.

    `at_once`, as in the compiler, nothing is lost; else what the call was given is.
    """
    real = getattr(model_runner, name)

    def fails(*words):
        if not too_much(words):
            return real(*words)
        if at_once:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in hbm")
        given, _ = _exhaust(words[2])  # told by who waits for it
        return given if name == "encode" else (real(*words[:2], given, *words[3:])[0], given)

    monkeypatch.setattr(model_runner, name, fails)


def request(processor, text: str, tokens: int, pictures: int = 0, shade: int = 9) -> Request:
    images = [Image.new("RGB", (60, 60), (40 * n, shade, 9)) for n in range(1, pictures + 1)]
    parts = [*[{"type": "image"}] * pictures, {"type": "text", "text": text}]
    example = processor.example([{"role": "user", "content": parts}], images)
    return Request(example, max_new_tokens=tokens)


def long_request(processor, length: int = BIG) -> Request:
    ids = np.full(length, processor.tokenizer.encode_text("word")[0], np.int32)
    tiles = request(processor, "", 1).example.tiles
    return Request(Example("long", ids, np.zeros(length, bool), tiles, ()), max_new_tokens=8)


def run(engine, answers: dict[int, list[int]]) -> list[int]:
    """Drives the engine until it is idle; who has run out of memory."""
    ended = []
    while not engine.idle:
        try:
            for ticket, piece in engine.step():
                answers.setdefault(ticket, []).extend(token.id for token in piece.tokens)
        except OutOfMemory as error:
            ended.append(error.ticket)
    return ended


@pytest.mark.parametrize("at_once", [True, False], ids=["nothing lost", "cache lost"])
@pytest.mark.parametrize("where", ["prefill", "decode", "encode"])
def test_the_others_go_on_with_the_same_answers(loaded, monkeypatch, where, at_once):
    model, processor = loaded
    others = [request(processor, "What is it for?", 40), request(processor, "And this?", 40, 2)]

    def asked() -> tuple:
        engine, answers = engine_for(model, processor, max_num_seqs=4, max_length=CONTEXT), {}
        tickets = [engine.add(other) for other in others]
        while not all(len(answers.get(ticket, [])) > 4 for ticket in tickets):
            for ticket, piece in engine.step():
                answers.setdefault(ticket, []).extend(token.id for token in piece.tokens)
        return engine, answers

    engine, expected = asked()
    assert run(engine, expected) == []
    engine, answers = asked()
    assert all(len(answers[ticket]) < len(expected[ticket]) for ticket in expected)
    if where == "encode":
        last = request(processor, "Many", 8, pictures=4, shade=200)
        exhausted_by(monkeypatch, where, lambda words: len(words[3]) > 2, at_once=at_once)
    else:
        last = long_request(processor)
        too_much = {
            "prefill": lambda words: _prompt(words) >= BIG,
            "decode": lambda words: int(np.max(words[3].lengths)) >= BIG,
        }[where]
        exhausted_by(monkeypatch, where, too_much, at_once=at_once)
    ticket = engine.add(last)
    assert run(engine, answers) == [ticket]
    answers.pop(ticket, None)
    assert answers == expected
    again = engine.add(others[1])  # whose images were in the pool
    assert run(engine, answers) == []
    assert answers[again] == expected[max(expected)]


def test_a_pool_that_cannot_grow_ends_the_request_that_needs_it(loaded, monkeypatch):
    model, processor = loaded
    engine = engine_for(model, processor, max_num_seqs=2, max_length=CONTEXT)
    fits, too_many = request(processor, "One", 8, 1), request(processor, "Many", 8, 4, shade=200)
    engine._pool = FeaturePool(model, 2, model.compute_dtype)

    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(FeaturePool, "_grow", full)
    tickets = [engine.add(each) for each in (too_many, fits)]
    answers: dict[int, list[int]] = {}
    assert run(engine, answers) == tickets[:1]
    assert len(answers[tickets[1]]) > 0


def test_pieces_made_before_a_failure_are_not_lost(loaded, monkeypatch):
    """One request ends in the step in which another runs out of memory."""
    model, processor = loaded
    engine = engine_for(model, processor, max_num_seqs=2, max_length=CONTEXT)
    one = engine.add(request(processor, "Hello", 1))  # ends with what reading it gives
    engine._admit()
    engine._read_some()
    assert engine._pieces and engine.running == 0 and not engine.idle
    exhausted_by(monkeypatch, "prefill", lambda words: _prompt(words) >= BIG, at_once=True)
    long = engine.add(long_request(processor))
    answers: dict[int, list[int]] = {}
    assert run(engine, answers) == [long]
    assert len(answers[one]) == 1


def test_an_engine_without_memory_for_the_smallest_prompt_cannot_go_on(loaded, monkeypatch):
    model, processor = loaded
    engine = engine_for(model, processor, max_num_seqs=2, max_length=CONTEXT)
    exhausted_by(monkeypatch, "prefill", lambda words: True, at_once=False)
    engine.add(request(processor, "Hello", 8))
    with pytest.raises(jax.errors.JaxRuntimeError, match="Out of memory"):
        run(engine, {})


def test_other_faults_of_the_device_are_no_want_of_memory(loaded, monkeypatch):
    model, processor = loaded
    engine = engine_for(model, processor, max_num_seqs=2, max_length=CONTEXT)

    def fails(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: the device is gone")

    monkeypatch.setattr(model_runner, "prefill", fails)
    engine.add(long_request(processor))
    with pytest.raises(jax.errors.JaxRuntimeError, match="the device is gone"):
        run(engine, {})


# Over HTTP


def test_a_request_without_memory_gets_507_and_the_server_goes_on(loaded, monkeypatch):
    model, processor = loaded
    engine = engine_for(model, processor, max_num_seqs=4, max_length=CONTEXT)
    with serving(engine, processor, rows=4) as world, ThreadPoolExecutor(4) as pool:

        def ask(number: int) -> str:
            parts = [image(data_uri(number)), {"type": "text", "text": "What?"}]
            return world.ask(parts, max_tokens=30).json()["choices"][0]["message"]["content"]

        expected = list(pool.map(ask, range(3)))
        exhausted_by(monkeypatch, "prefill", lambda words: _prompt(words) >= BIG, at_once=False)
        answers = [pool.submit(ask, number) for number in range(3)]
        text = "x! " * BIG
        while len(processor.tokenizer.encode_text(text)) > CONTEXT - 40:
            text = text[: -len(text) // 10]
        for stream in (False, True):
            response = world.ask(text, max_tokens=4, stream=stream)
            error = error_of(response, 507)
            assert (error["code"], error["type"]) == ("out_of_memory", "server_error")
            assert "shorten it" in error["message"]
            assert response.headers["x-should-retry"] == "false"
        assert [answer.result() for answer in answers] == expected
        assert world.http.get("/health").json()["status"] == "ok"
        assert ask(0) == expected[0]
        assert (world.service.running, world.service.waiting) == (0, 0)


def test_a_prompt_that_the_host_has_no_memory_for_gets_507(tiny_processor, monkeypatch):
    def full(*_, **__):
        raise MemoryError

    with running(tiny_processor) as world:
        with monkeypatch.context() as patched:
            patched.setattr(tiny_processor, "joined", full)
            assert "fewer or smaller images" in world.refused(507)["message"]
        assert world.ask().status_code == 200


# The process


def test_a_broken_engine_ends_the_process_with_an_exit_code(tiny_checkpoint):
    words = [sys.executable, Path(__file__).with_name("scripted_server.py"), tiny_checkpoint, 0, 20]
    path = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=path
    ) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        response = httpx2.post(f"{url}/v1/chat/completions", json=body(FAIL), timeout=DEADLINE)
        error_of(response, 500)  # it is told before the end
        try:
            assert server.wait(DEADLINE) == 1
        finally:
            server.kill()


def test_the_command_ends_with_1_and_one_line(tiny_checkpoint, monkeypatch, capsys):
    class Config:
        class config:
            class text:
                max_position = 100

    def fails(*_, **__):
        raise EngineFailure("the engine failed (RuntimeError: x); the server has ended")

    monkeypatch.setattr(server_run, "serve", fails)
    monkeypatch.setattr(serving_verb, "load_quietly", lambda *_, **__: (None, Config))
    with pytest.raises(SystemExit) as ended:
        main(["serve", str(tiny_checkpoint), "--port", "0"])
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert told == "mis-jax: error: the engine failed (RuntimeError: x); the server has ended\n"
