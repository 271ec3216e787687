"""The load test passes a server that is right, and fails one that mixes answers up."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "serve"))
try:
    from scripted_engine import ScriptedEngine
    from serve_world import serving
finally:
    sys.path.pop(0)


class Mixing(ScriptedEngine):
    """Now and then, with other answers under way, a row tells another row's script."""

    def add(self, request):
        ticket = super().add(request)
        others = [number for number in self.scripts if number != ticket]
        if ticket % 7 == 0 and others:
            self.scripts[ticket] = request, self.scripts[others[0]][1]
        return ticket


@pytest.mark.parametrize(("engine", "code"), [(ScriptedEngine, 0), (Mixing, 1)])
def test_load(tiny_processor, engine, code):
    words = ["--clients=12", "--seconds=0.7", "--prompts=24", "--max-tokens=40", "--json"]
    with serving(engine(tiny_processor, 4), tiny_processor, rows=4, queue=3) as world:
        ran = subprocess.run(
            [sys.executable, ROOT / "tools" / "load_test.py", world.url, *words],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    assert ran.returncode == code, ran.stdout + ran.stderr
    found = json.loads(ran.stdout)
    assert found["answers"] > 20
    assert found["refused_429"] > 0  # 12 clients for 7 places
    assert found["distinct_answers"] == 24
    assert ("mixed" in found["wrong"]) == (code == 1)
    assert found["memory_mib_after"] > 10
