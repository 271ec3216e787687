"""The server against requests made up from its own OpenAPI document."""

import subprocess
import sys
from pathlib import Path

import pytest
from serve_world import MODEL, running

# What fits the schema may still be refused: too long, a bad image, no question at its end.
EXCLUDED = "positive_data_acceptance"


def test_the_document_names_what_there_is(world):
    told = world.http.get("/openapi.json").json()
    assert told["openapi"].startswith("3.1")
    for path in ("/", "/health", "/metrics", "/v1/models", f"/v1/models/{MODEL}"):
        assert world.http.get(path).status_code == 200
    assert told["paths"].keys() == {
        "/", "/health", "/metrics", "/v1/models", "/v1/models/{model}", "/v1/chat/completions",
    }  # fmt: skip
    asked = told["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "max_dynamic_patch", "system_prompt", "stop", "seed"} <= asked.keys()
    assert asked["model"]["enum"] == [MODEL]


@pytest.mark.slow
def test_a_fuzz_of_every_operation(tiny_processor, tmp_path: Path):
    with running(tiny_processor, queue=200) as world:
        words = [
            "run", f"{world.url}/openapi.json", "--phases", "coverage,fuzzing",
            "--exclude-checks", EXCLUDED, "-n", "50", "--continue-on-failure", "--no-shrink",
            "--generation-database", "none", "--report", "json",
            "--report-json-path", str(tmp_path / "report.json"),
        ]  # fmt: skip
        program = "from schemathesis.cli import schemathesis; schemathesis()"
        fuzzed = subprocess.run(
            [sys.executable, "-c", program, *words],
            cwd=tmp_path, capture_output=True, text=True, timeout=180,
        )  # fmt: skip
        assert fuzzed.returncode == 0, fuzzed.stdout + fuzzed.stderr
        asked = world.http.get("/metrics").text
        assert 'requests_total{status="200"}' in asked  # not all of it was refused
        assert 'status="5' not in asked
        assert world.ask().status_code == 200
        assert (world.service.running, world.service.waiting) == (0, 0)
