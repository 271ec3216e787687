"""Too many, too slow, gone away, shut down, broken: what a server does when not all is well."""

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import openai
import pytest
from scripted_engine import CONTEXT, FAIL, ScriptedEngine
from serve_world import MODEL, World, body, error_of, running
from starlette.types import Message
from waiting import until

from mis_jax.inference.async_engine import Service
from mis_jax.server import chat_completions
from mis_jax.server.access import Settings
from mis_jax.server.app import create_app

CHAT = "/v1/chat/completions"
LONG = "a rather long question " * 4


def raw_request(world: World, content: bytes) -> socket.socket:
    """A connection over which this body is being answered."""
    raw = socket.create_connection(("127.0.0.1", int(world.url.rpartition(":")[2])))
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    raw.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return raw


def gauges(world: World) -> tuple[float, float]:
    """Running and waiting, as /metrics tells."""
    lines = dict(
        line.split(" ", 1)
        for line in world.http.get("/metrics").text.splitlines()
        if line.startswith("mis_jax_requests_") and "{" not in line
    )
    return float(lines["mis_jax_requests_running"]), float(lines["mis_jax_requests_waiting"])


def counted(world: World, status: int) -> float:
    start = f'mis_jax_requests_total{{status="{status}"}} '
    lines = world.http.get("/metrics").text.splitlines()
    return sum(float(line.removeprefix(start)) for line in lines if line.startswith(start))


# Too many


def test_every_request_beyond_the_limit_gets_429_at_once(tiny_processor):
    with running(tiny_processor, rows=2, queue=3) as world, ThreadPoolExecutor(40) as pool:
        world.engine.gate.clear()
        start = threading.Barrier(40)

        def ask(number: int) -> tuple[httpx2.Response, float]:
            start.wait()
            began = time.monotonic()
            return world.ask(f"number {number}"), time.monotonic() - began

        asked = [pool.submit(ask, number) for number in range(40)]
        until(lambda: sum(future.done() for future in asked) == 35)  # while nothing is answered
        assert gauges(world) == (2, 3)
        assert world.http.get("/health").json() == {
            "status": "busy", "reason": "all 5 places are taken; a request gets 429 now",
            "running": 2, "waiting": 3,
        }  # fmt: skip
        refused = [future.result() for future in asked if future.done()]
        for response, seconds in refused:
            error = error_of(response, 429)
            assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
            assert response.headers["retry-after"] == "1"
            assert seconds < 2
        assert counted(world, 429) == 35
        world.engine.gate.set()
        answered = {
            number: future.result()[0].json()["choices"][0]["message"]["content"]
            for number, future in enumerate(asked)
            if future.result()[0].status_code == 200
        }
        assert len(answered) == 5
        assert answered == {number: f"0 tiles: number {number}" for number in answered}
        assert gauges(world) == (0, 0)
        assert world.http.get("/health").json()["status"] == "ok"
        assert counted(world, 200) == 5


def test_the_openai_client_tries_again_after_429(tiny_processor):
    with running(tiny_processor, rows=1, queue=0) as world:
        world.engine.gate.clear()
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(world.ask)
            until(lambda: world.service.running == 1)
            with world.openai() as client, pytest.raises(openai.RateLimitError):
                client.chat.completions.create(**body())
            threading.Timer(0.3, world.engine.gate.set).start()
            with world.openai() as client:
                again = client.with_options(max_retries=5).chat.completions.create(**body())
            assert again.choices[0].message.content == "0 tiles: hello"
            assert first.result().status_code == 200


# Gone away


@pytest.mark.parametrize("streamed", [True, False])
def test_a_killed_client_frees_its_row_and_its_place(tiny_processor, streamed):
    with running(tiny_processor, rows=1, queue=1, pause=0.02) as world:
        content = json.dumps(body(LONG, stream=streamed)).encode()
        raw = raw_request(world, content)
        if streamed:
            assert b"200 OK" in raw.recv(100)
        until(lambda: world.service.running == 1)
        waiting = raw_request(world, content)
        until(lambda: world.service.waiting == 1)
        error_of(world.ask(), 429)
        raw.close()
        until(lambda: world.engine.cancelled == [1])
        until(lambda: (world.service.running, world.service.waiting) == (1, 0))
        waiting.close()  # it may have been running or waiting
        until(lambda: (world.service.running, world.service.waiting) == (0, 0))
        assert world.ask().status_code == 200
        assert counted(world, 499) == 2


def test_a_killed_process_frees_its_place(tiny_processor):
    program = (
        "import sys, openai\n"
        "client = openai.OpenAI(base_url=sys.argv[1], api_key='none')\n"
        "messages = [{'role': 'user', 'content': sys.argv[2]}]\n"
        "asked = dict(model='scripted', messages=messages, stream=True)\n"
        "for chunk in client.chat.completions.create(**asked): print('chunk', flush=True)\n"
    )
    with running(tiny_processor, rows=1, queue=0, pause=0.02) as world:
        words = [sys.executable, "-c", program, f"{world.url}/v1", LONG]
        with subprocess.Popen(words, stdout=subprocess.PIPE) as client:
            assert client.stdout is not None
            client.stdout.readline()
            client.kill()
        until(lambda: world.service.running == 0)
        assert world.engine.cancelled == [1]


def test_a_cancelled_stream_of_the_openai_client(tiny_processor):
    with running(tiny_processor, rows=1, queue=0, pause=0.02) as world, world.openai() as client:
        stream = client.chat.completions.create(**body(LONG, stream=True))
        next(stream)
        stream.close()
        until(lambda: world.service.running == 0)
        assert world.engine.cancelled == [1]


# Too slow


def test_the_timeout_of_a_request(tiny_processor):
    with running(tiny_processor, rows=1, pause=0.05, timeout=0.4) as world:
        error = world.refused(504, LONG)
        assert (error["code"], error["type"]) == ("timeout", "server_error")
        assert "limit of 0.4 s" in error["message"]
        until(lambda: world.service.running == 0)
        assert world.engine.cancelled == [1]
        with world.openai() as client, pytest.raises(openai.APIError, match=r"limit of 0\.4 s"):
            list(client.chat.completions.create(**body(LONG, stream=True)))
        with world.http.stream("POST", CHAT, json=body(LONG, stream=True)) as response:
            lines = [line for line in response.iter_lines() if line]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        assert not any("[DONE]" in line for line in lines)
        assert counted(world, 504) == 3


def test_a_client_that_does_not_read_is_cut_off(tiny_processor, monkeypatch):
    monkeypatch.setattr(chat_completions, "_LAST_WORD_SECONDS", 0.1)
    service = Service(ScriptedEngine(tiny_processor, 1), max_concurrent=1, max_queue=0)
    app = create_app(service, tiny_processor, Settings(MODEL, CONTEXT, timeout=0.3))
    sent: list[Message] = []
    bodies = [{"type": "http.request", "body": json.dumps(body(stream=True)).encode()}]

    async def receive() -> Message:
        return bodies.pop() if bodies else await asyncio.Future()

    async def send(message: Message) -> None:
        sent.append(message)
        if len(sent) > 2:  # the connection's buffer is full
            await asyncio.Future()

    scope = {
        "type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(),
        "root_path": "", "query_string": b"", "headers": [(b"content-type", b"application/json")],
    }  # fmt: skip
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 5))
    assert (service.running, service.waiting) == (0, 0)
    assert b"timeout" in sent[-1]["body"]
    service.close()


# Broken


def test_a_broken_engine(tiny_processor, caplog):
    with running(tiny_processor) as world:
        world.engine.gate.clear()
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(world.ask, "the secret prompt")
            until(lambda: world.service.running == 1)
            error = world.refused(500, FAIL)
            assert "secret" not in error["message"]
            error_of(other.result(), 500)
        assert error_of(world.ask(), 503)["message"].startswith("the engine has failed")
        health = world.http.get("/health")
        assert health.status_code == 503
        assert health.json()["status"] == "unavailable"
    logged = [record for record in caplog.records if record.exc_info]
    assert "a secret of the device" in str(logged[0].exc_info[1])


def test_the_log_holds_no_prompt_and_no_key(tiny_processor, caplog):
    caplog.set_level(logging.DEBUG)
    with running(tiny_processor, api_key="the-key") as world:
        with world.openai("the-key") as client:
            client.chat.completions.create(**body("the prompt"))
        world.ask("the prompt")
    ours = [r.getMessage() for r in caplog.records if r.name.startswith(("mis_jax", "uvicorn"))]
    assert any("200: " in line for line in ours)
    assert not [line for line in ours if "the prompt" in line or "the-key" in line]


# Shut down


@pytest.fixture
def process(tiny_checkpoint: Path, request) -> Iterator[tuple[subprocess.Popen, str]]:
    pause, drain = request.param
    words = [sys.executable, Path(__file__).with_name("scripted_server.py"), tiny_checkpoint]
    with subprocess.Popen(
        [*map(str, words), str(pause), str(drain)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as server:
        assert server.stdout is not None
        yield server, server.stdout.readline().strip()
        server.kill()


@pytest.mark.parametrize("process", [(0.05, 20)], indirect=True)
def test_sigterm_finishes_what_runs_and_waits_and_refuses_the_rest(process):
    server, url = process
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    with ThreadPoolExecutor(2) as pool:
        stream = client.chat.completions.create(**body("one two three four", stream=True))
        first = next(stream)
        waits = pool.submit(client.chat.completions.create, **body("five six"))
        until(lambda: httpx2.get(f"{url}/health").json()["waiting"] == 1)
        server.send_signal(signal.SIGTERM)
        until(lambda: httpx2.get(f"{url}/health").status_code == 503)
        with pytest.raises(openai.InternalServerError, match="shutting down") as refused:
            client.chat.completions.create(**body())
        assert refused.value.status_code == 503
        rest = [first, *stream]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in rest)
        assert text == "0 tiles: one two three four"
        assert rest[-1].choices[0].finish_reason == "stop"
        assert waits.result().choices[0].message.content == "0 tiles: five six"
    client.close()
    assert server.wait(10) == 0


@pytest.mark.parametrize("process", [(0.2, 0.3)], indirect=True)
def test_what_is_not_finished_in_time_is_told_so(process):
    server, url = process
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(**body(LONG, stream=True))
        next(stream)
        server.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
    assert server.wait(10) == 0
