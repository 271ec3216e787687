"""Requests that come slowly or not at all cost no place, and not for long."""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx2
import pytest
import uvicorn
from serve_world import World, body, error_of, running
from test_limits import raw_request
from waiting import DEADLINE, until

from mis_jax.server import bodies, run
from mis_jax.server.run import bind, config_of

CHAT = "/v1/chat/completions"
HALF = (
    f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    "Content-Length: 1000\r\n\r\n{"
).encode()


def connected(world: World, content: bytes = b"") -> socket.socket:
    """A connection over which so much has been sent."""
    raw = socket.create_connection(("127.0.0.1", int(world.url.rpartition(":")[2])), DEADLINE)
    raw.sendall(content)
    return raw


def everything(raw: socket.socket) -> bytes:
    """What comes until the server hangs up."""
    heard = b""
    with contextlib.suppress(ConnectionResetError):
        while more := raw.recv(10_000):
            heard += more
    raw.close()
    return heard


# Bodies


def test_half_sent_bodies_hold_no_place(tiny_processor):
    with running(tiny_processor, rows=1, queue=0) as world:
        halves = [connected(world, HALF) for _ in range(20)]
        assert world.ask().status_code == 200
        assert world.http.get("/health").json()["waiting"] == 0
        for half in halves:
            half.close()


def test_a_body_has_a_short_time_of_its_own(tiny_processor, monkeypatch):
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.2)
    monkeypatch.setattr(bodies, "DRAIN_SECONDS", 0.1)
    with running(tiny_processor) as world:  # whose requests may take ten minutes
        heard = everything(connected(world, HALF))
        assert b"408 Request Timeout" in heard
        assert b"the body did not come within 0.2 s" in heard


def test_a_long_body_that_keeps_coming_has_more_time(monkeypatch):
    """At the least rate, whatever its length."""
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.2)
    monkeypatch.setattr(bodies, "LEAST_RATE", 1000)

    async def read(chunk: bytes) -> int:
        async def receive():
            await asyncio.sleep(0.05)
            return {"type": "http.request", "body": chunk, "more_body": next(left) > 0}

        left = iter(range(7, -1, -1))
        scope = {"type": "http", "headers": [(b"content-type", b"application/json")]}
        async with bodies.Bodies(10**6, 10**6).read(bodies.Request(scope, receive)) as content:
            return len(content)

    assert asyncio.run(read(bytes(1000))) == 8000
    with pytest.raises(bodies.ApiError) as refused:
        asyncio.run(read(b"x"))
    assert refused.value.status == 408


def test_bodies_together_have_a_bound(tiny_processor):
    with running(tiny_processor, rows=1, queue=1, max_body=1000) as world:
        head = HALF.removesuffix(b"{")
        halves = [connected(world, head + b"{" * 950) for _ in range(2)]
        text = "a" * 500  # one that is shorter finds room
        until(lambda: world.ask(text).status_code == 429)
        assert "fill this server's memory" in error_of(world.ask(text), 429)["message"]
        for half in halves:
            half.close()
        until(lambda: world.ask().status_code == 200)


def test_a_full_server_refuses_before_it_reads(tiny_processor):
    with running(tiny_processor, rows=1, queue=0) as world:
        world.engine.gate.clear()
        raw = raw_request(world, json.dumps(body()).encode())
        until(lambda: world.service.running == 1)
        half = connected(world, HALF)
        assert b"429 Too Many Requests" in half.recv(1000)
        half.close()
        world.engine.gate.set()
        assert b"200 OK" in raw.recv(1000)
        raw.close()


# Headers


@pytest.mark.parametrize(
    ("sent", "heard"),
    [
        (b"", b""),
        (b"POST /v1/chat", b"408 Request Timeout"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: ", b"408 Request Timeout"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /hea", b"200 OK"),  # the second is half
    ],
)
def test_half_sent_headers_are_closed(tiny_processor, monkeypatch, sent, heard):
    monkeypatch.setattr(run, "HEADER_SECONDS", 0.2)
    with running(tiny_processor, keep_alive=0.2) as world:
        assert everything(connected(world, sent)).startswith(heard and b"HTTP/1.1 " + heard)


def test_a_header_that_drips_is_closed(tiny_processor, monkeypatch):
    """Its time is not begun anew with every byte."""
    monkeypatch.setattr(run, "HEADER_SECONDS", 0.3)
    with running(tiny_processor) as world:
        raw = connected(world, b"GET /health HTTP/1.1\r\n")
        raw.settimeout(0.02)
        heard = b""

        def closed() -> bool:
            nonlocal heard
            with contextlib.suppress(TimeoutError, ConnectionError):
                heard += raw.recv(1000)
            try:
                raw.sendall(b"x")
            except ConnectionError:
                return True
            return b"408" in heard

        until(closed)
        raw.close()


def test_a_request_that_takes_longer_than_a_header_is_answered(tiny_processor, monkeypatch):
    monkeypatch.setattr(run, "HEADER_SECONDS", 0.1)
    with running(tiny_processor, pause=0.03) as world:
        for _ in range(2):  # on one connection
            assert world.ask("one two three").status_code == 200


def test_a_body_that_drips_after_its_answer_is_closed(tiny_processor, monkeypatch):
    monkeypatch.setattr(run, "HEADER_SECONDS", 0.2)
    monkeypatch.setattr(bodies, "DRAIN_SECONDS", 0.1)
    with running(tiny_processor) as world:
        raw = connected(world, HALF.replace(b"application/json", b"text/plain"))
        until(lambda: b"415" in raw.recv(1000))

        def closed() -> bool:
            try:
                raw.sendall(b"x")
            except ConnectionError:
                return True
            return False

        until(closed)
        raw.close()


def test_more_connections_than_a_shell_allows_files(tiny_checkpoint):
    words = [sys.executable, Path(__file__).with_name("scripted_server.py"), tiny_checkpoint, 0, 0]
    limited = ["bash", "-c", 'ulimit -Sn 100; exec "$@"', "bash", *map(str, words)]
    path = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(limited, stdout=subprocess.PIPE, text=True, env=path) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        with contextlib.ExitStack() as held:
            for _ in range(150):
                held.enter_context(socket.create_connection(address, DEADLINE))
            assert httpx2.get(f"{url}/health", timeout=DEADLINE).json()["status"] == "ok"
        server.kill()


# Answers


def test_a_client_that_does_not_read_its_answer_is_cut_off(monkeypatch):
    monkeypatch.setattr(run, "STALL_SECONDS", 0.2)
    told: list[str] = []

    async def long(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(64):  # megabytes: more than the system's buffers hold
            await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})
        told.append((await receive())["type"])

    server = uvicorn.Server(config_of(long))
    bound = bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    until(lambda: server.started)
    with socket.create_connection(bound.getsockname(), DEADLINE) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        until(lambda: told == ["http.disconnect"])
        server.should_exit = True
        thread.join(DEADLINE)


# Health


def test_health_tells_of_an_engine_whose_thread_has_ended(tiny_processor, monkeypatch):
    """Whatever ended it."""
    with running(tiny_processor) as world:

        def step():
            raise SystemExit

        monkeypatch.setattr(world.engine, "step", step)
        error_of(world.ask(), 500)
        health = world.http.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "unavailable")
