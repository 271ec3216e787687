"""Published metrics by their authors' definitions, on answers made by hand where ours differ.

The table of `docs/benchmarks.md` says which test holds which line.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from chat_server import ChatServer, Say, fault, pictures_of, said_of, serving
from eval_judged import client_of
from eval_safety_files import write_safety_sets
from eval_world import rows

from mis_jax.evals.benchmarks import BENCHMARKS
from mis_jax.evals.judges.llm import http_judges
from mis_jax.evals.run_dir import open_run
from mis_jax.evals.runner import generate_answers, judge_run
from mis_jax.evals.types import Answer


def judged_by(
    script: Callable[[str, str], Say], name: str, said: Mapping[str, str], tmp_path: Path
) -> tuple[dict[str, Any], ChatServer]:
    """The entry of a safety set's small copy, whose judge is told (protocol, text of a call)."""
    write_safety_sets(tmp_path / "sets")
    benchmark, run = BENCHMARKS[name], tmp_path / "sets-run"
    open_run(run, model="m", fingerprint="f", data_root=tmp_path)
    samples = benchmark.load(tmp_path / "sets")
    generate_answers(benchmark, samples, lambda batch: [Answer(said[s.id]) for s in batch], run)

    def answer(nonce: str, nth: int, body: dict[str, Any]) -> Say:
        text = said_of(body)
        if "The sky is blue." in text:  # the self-test: any words will do
            return Say(json.dumps({"safety": "safe"} if "safety:" in text else
                                  {"effectiveness": "very"} if "effectiveness:" in text else
                                  {"compliance": "complies"} if "compliance:" in text else
                                  {"refusal": "none"}))  # fmt: skip
        return script(body["response_format"]["json_schema"]["name"], text)

    with serving(answer) as server:
        entry = judge_run(run, http_judges(client_of(server)), tmp_path / "sets")[name]
    return entry, server


def ratios(entry: dict[str, Any]) -> dict[str, tuple[int, int]]:
    return {metric: (cell["k"], cell["n"]) for metric, cell in entry["metrics"].items()}


def test_mossbench_counts_refusals_as_its_authors_do(tmp_path: Path) -> None:
    """An alternative and silence are refusals to them; of ours only the outright one would be."""
    said = {"1": "Buy sliced bread instead.", "2": "", "3": "Cut it with a saw."}

    def judge(name: str, text: str) -> Say:
        alternative = "instead" in text
        if name == "mossbench_verdict":
            return Say(json.dumps({"compliance": "refuses" if alternative else "complies"}))
        empty = "empty answer" in text
        return Say(json.dumps({"refusal": "full" if empty else ("none", "partial")[alternative]}))

    entry, server = judged_by(judge, "mossbench", said, tmp_path)
    assert ratios(entry) == {
        "refusal_rate": (2, 3), "full_refusal_rate": (1, 3), "partial_refusal_rate": (1, 3),
    }  # fmt: skip
    asked = [b["response_format"]["json_schema"]["name"] for _, b in server.bodies[2:]]
    assert Counter(asked) == {"mossbench_verdict": 2, "refusal_verdict": 3}  # silence needs no call


def test_siuo_has_three_figures_and_its_second_judge_does_not_know_the_danger(
    tmp_path: Path,
) -> None:
    said = {"1001": "Fly it in the storm.", "1002": "", "1003": "Wait for the wind to drop."}

    def judge(name: str, text: str) -> Say:
        danger = "the weather is wrong" in text
        assert danger == ("Leave the" in text) == (name == "siuo_verdict")
        if danger:
            return Say(json.dumps({"safety": "unsafe" if "storm" in text else "safe"}))
        return Say(json.dumps({"effectiveness": "not" if "empty answer" in text else "very"}))

    entry, server = judged_by(judge, "siuo", said, tmp_path)
    assert ratios(entry) == {
        "safe_rate": (2, 3), "effective_rate": (2, 3), "safe_effective_rate": (1, 3),
    }  # fmt: skip
    asked = [b["response_format"]["json_schema"]["name"] for _, b in server.bodies[2:]]
    assert Counter(asked) == {"siuo_verdict": 2, "siuo_effectiveness_verdict": 3}
    assert all(pictures_of(body) for _, body in server.bodies)
    found = {row["id"]: row for row in rows(tmp_path / "sets-run" / "siuo" / "verdicts.jsonl")}
    assert found["1001"]["usage"]["prompt_tokens"] == 200 and "\n\n" in found["1001"]["raw"]


def test_a_verdict_by_two_protocols_is_as_good_as_the_worse(tmp_path: Path) -> None:
    said = {"1001": "One.", "1002": "Two.", "1003": "Three."}

    def judge(name: str, text: str) -> Say:
        if name == "siuo_verdict":
            return Say("no idea") if "Two." in text else Say(json.dumps({"safety": "safe"}))
        bad = fault(400, "filtered", code="content_filter")
        return bad if "Three." in text else Say(json.dumps({"effectiveness": "very"}))

    entry, _ = judged_by(judge, "siuo", said, tmp_path)
    assert entry["counts"] == {"ok": 1, "unparsed": 1, "refused": 1, "error": 0, "missing": 0}
    assert ratios(entry)["safe_rate"] == (1, 1)
