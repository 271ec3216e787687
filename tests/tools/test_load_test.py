"""The load test passes a server that is right, and fails one that mixes answers up."""

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tyro
from scripted_engine import ScriptedEngine
from serve_world import serving

from mis_jax.server import bodies, protocol, run

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))
import load_hostile
import load_test

Ran = tuple[int, dict[str, Any]]  # the exit code, and what was printed


@pytest.fixture
def load(capsys, monkeypatch) -> Callable[..., Ran]:
    """The command with these words, in this process."""
    monkeypatch.setattr(protocol, "RETRY_SECONDS", 0.05)

    def load(*words: str) -> Ran:
        code = 0
        try:
            tyro.cli(load_test.main, args=[*words, "--json"])
        except SystemExit as end:
            code = end.code
        return code, json.loads(capsys.readouterr().out)

    return load


class Mixing(ScriptedEngine):
    """Now and then, with other answers under way, a row tells another row's script."""

    def add(self, request):
        ticket = super().add(request)
        others = [number for number in self.scripts if number != ticket]
        if ticket % 7 == 0 and others:
            self.scripts[ticket] = request, self.scripts[others[0]][1]
        return ticket


@pytest.mark.parametrize(("engine", "code"), [(ScriptedEngine, 0), (Mixing, 1)])
def test_load(load, tiny_processor, engine, code):
    words = ["--clients=12", "--seconds=0.7", "--prompts=24", "--max-tokens=40"]
    with serving(engine(tiny_processor, 4), tiny_processor, rows=4, queue=3) as world:
        ended, found = load(world.url, *words)
    assert ended == code, found
    assert found["answers"] > 20
    assert found["refused_429"] > 0  # 12 clients for 7 places
    assert found["distinct_answers"] == 24
    assert ("mixed" in found["wrong"]) == (code == 1)
    assert found["memory_mib_after"] > 10


def test_hostile_clients_are_refused_or_ended(load, tiny_processor, monkeypatch):
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.3)
    monkeypatch.setattr(run, "HEADER_SECONDS", 0.3)
    monkeypatch.setattr(bodies, "DRAIN_SECONDS", 0.3)
    words = ["--clients=6", "--hostile=9", "--seconds=1", "--prompts=12", "--max-tokens=9"]
    with serving(ScriptedEngine(tiny_processor, 4), tiny_processor, rows=4, queue=9) as world:
        code, found = load(world.url, *words)
    assert code == 0, found
    assert found["answers"] > 0 and not found["wrong"]
    assert set(found["health"]) <= {"200 ok", "200 busy"}
    ends = {kind.split(":")[0] for kind in found["hostile"]}
    assert {"half header", "half body", "gone", "bomb", "16 MB field", "empty turns"} <= ends


def test_a_server_that_leaves_half_requests_alone_fails(monkeypatch):
    monkeypatch.setattr(load_hostile, "_PATIENCE", 0.1)

    async def ask() -> Counter[str]:
        over = asyncio.Event()

        async def ignore(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()
            await writer.wait_closed()
            over.set()

        server = await asyncio.start_server(ignore, "127.0.0.1", 0)
        async with server:
            host, port = server.sockets[0].getsockname()[:2]
            hostile = load_hostile.Hostile(f"http://{host}:{port}", "m", {})
            assert await hostile._half(b"POST ") == "left alone"
            await over.wait()
            return hostile.wrong

    assert asyncio.run(ask()) == {"a half request was not ended": 1}
