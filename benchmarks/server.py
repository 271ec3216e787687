"""The server under load: 64 clients at the tiny model, every answer checked.

`mis-jax serve` and the clients of `tools/load_test.py` are processes of their own. Each prompt is
asked once alone, then by all clients at once for a time, half of them streamed, a third with a
picture; an answer that is lost, doubled or not the one that was given alone ends the benchmark.
Clients share the machine with the server.

No peer is timed: `transformers serve` needs packages beside transformers (fastapi among them) that
this project does not install.
"""

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tyro

from benchmarks.common import save
from benchmarks.harness import Cell, line, show, summed_up

_ROOT = Path(__file__).parents[1]
MINI = _ROOT / "mis_jax" / "assets" / "mini"
#: Cells that are seconds of one answer, and what the load test calls them.
_WAITS = {
    "an answer, median": "latency_p50",
    "an answer, 99 of 100": "latency_p99",
    "first words of a stream, median": "first_token_p50",
    "first words of a stream, 99 of 100": "first_token_p99",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Example: python -m benchmarks server --clients 64 --save"""

    model: Path = MINI
    """Checkpoint folder."""
    clients: int = 64
    """How many ask at the same time."""
    seconds: float = 30.0
    """Of load in each round."""
    prompts: int = 96
    """Different ones; before each round every one is asked alone."""
    rounds: int = 5
    """Times of load, one after the other, at one server."""
    save: bool = False
    """Write the figures into benchmarks/results."""


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    with serving(settings.model) as url:
        rounds = [load(url, settings) for _ in range(settings.rounds)]
    cells = cells_of(rounds, settings.clients)
    for name, found in cells.items():
        print(line(name, found))
    show(f"{settings.clients} clients", cells)
    if settings.save:
        found = {
            "benchmark": "server",
            "model": settings.model.name,
            "settings": {"clients": settings.clients, "seconds": settings.seconds},
            "cells": cells,
            "memory_mib": round(max(found["memory_mib_after"] for found in rounds)),
        }
        print(f"wrote {save('server', found)}")


@contextmanager
def serving(model: Path) -> Iterator[str]:
    """The address of a server that answers."""
    command = [str(Path(sys.executable).parent / "mis-jax"), "serve", str(model), "--port", "0"]
    command += ["--warm-up", "32"]
    with tempfile.TemporaryFile("w+") as log:  # a line for each answer
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert child.stdout
        try:
            for told in child.stdout:
                if found := re.search(r"is served at (\S+)", told):
                    yield found[1].rstrip("/")
                    return
            log.seek(0)
            raise RuntimeError(f"the server ended with {child.wait()}: {log.read()[-2000:]}")
        finally:
            child.terminate()
            child.wait()


def load(url: str, settings: Settings) -> dict[str, Any]:
    """What the load test found; RuntimeError where an answer was wrong."""
    words = [f"--clients={settings.clients}", f"--seconds={settings.seconds}"]
    words += [f"--prompts={settings.prompts}", "--json"]
    ran = subprocess.run(
        [sys.executable, str(_ROOT / "tools" / "load_test.py"), url, *words],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    if ran.returncode:
        raise RuntimeError(f"the load test failed: {ran.stdout[-2000:]}")
    return json.loads(ran.stdout)


def cells_of(rounds: list[dict[str, Any]], clients: int) -> dict[str, Any]:
    rates = {
        "answers": ("answers", "answers_per_second"),
        "tokens": ("tokens", "tokens_per_second"),
    }
    cells = {
        Cell(f"{clients} clients, {name}", unit=unit): [1 / found[key] for found in rounds]
        for name, (unit, key) in rates.items()
    }
    cells |= {
        Cell(f"{clients} clients, {name}"): [found[key] for found in rounds]
        for name, key in _WAITS.items()
    }
    return {cell.name: summed_up(cell, {"ours": seconds}) for cell, seconds in cells.items()}


if __name__ == "__main__":
    main()
