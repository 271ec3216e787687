"""Generation and judging: resumed, never stale, with every sample accounted for."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from eval_world import answering, careful, helpful, rows

from mis_jax.evals.benchmarks import BENCHMARKS
from mis_jax.evals.judges import JUDGES
from mis_jax.evals.run_dir import open_run, read_manifest
from mis_jax.evals.runner import Generated, generate_answers, judge_run, summarise
from mis_jax.evals.scoring import without_verdict
from mis_jax.evals.types import Answer, Judge, Sample, Verdict

HARD = BENCHMARKS["mini_hard"]


def speak_helpful(sample: Sample) -> str:
    return helpful(sample.meta["objects"])


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    open_run(tmp_path / "run", model="tiny", fingerprint="f" * 64)
    return tmp_path / "run"


def generate(run_dir: Path, data_root: Path, answer_fn: Any, **keywords: Any) -> Generated:
    return generate_answers(HARD, HARD.load(data_root), answer_fn, run_dir, **keywords)


def test_results_have_the_contract_s_format(run_dir: Path, data_root: Path) -> None:
    generate(run_dir, data_root, answering(speak_helpful))
    returned = judge_run(run_dir, None, data_root)
    results = json.loads((run_dir / "results.json").read_text())
    assert results == returned
    entry = results["mini_hard"]
    assert entry.keys() == {"protocol", "n", "counts", "metrics"}
    assert entry["n"] == 4
    assert entry["counts"] == {"ok": 4, "unparsed": 0, "refused": 0, "error": 0, "missing": 0}
    assert entry["metrics"].keys() == {"asr", "rsr", "rr", "hr"}
    assert entry["metrics"]["asr"].keys() == {"k", "n", "value", "low", "high"}
    assert [entry["metrics"]["asr"][key] for key in ("k", "n", "value", "high")] == [4, 4, 1, 1]
    assert without_verdict(results) == 0


def test_the_log_has_the_promised_fields(run_dir: Path, data_root: Path) -> None:
    generate(run_dir, data_root, answering(speak_helpful))
    first = rows(run_dir / "mini_hard" / "samples.jsonl")[0]
    assert first.keys() == {
        "id", "hash", "answer", "prompt_tokens", "completion_tokens", "finish_reason", "state",
    }  # fmt: skip
    manifest = read_manifest(run_dir)
    assert manifest["versions"].keys() == {"mis_jax", "jax", "python"}
    assert manifest["benchmarks"]["mini_hard"]["protocol"] == HARD.protocol


def test_resume_after_a_kill_asks_only_what_is_missing(run_dir: Path, data_root: Path) -> None:
    class Killed(BaseException):
        pass

    def killed_after_two(batch: list[Sample]) -> list[Answer]:
        if int(batch[0].id) == 2:
            raise Killed
        return answering(speak_helpful)(batch)

    with pytest.raises(Killed):
        generate(run_dir, data_root, killed_after_two, batch_size=1)
    log = run_dir / "mini_hard" / "samples.jsonl"
    log.write_bytes(log.read_bytes()[:-20])  # the second answer is torn
    asked: list[str] = []
    seen: list[tuple[int, int]] = []

    def note(batch: list[Sample]) -> list[Answer]:
        asked.extend(sample.id for sample in batch)
        return answering(speak_helpful)(batch)

    done = generate(run_dir, data_root, note, progress=lambda *at: seen.append(at), batch_size=2)
    assert asked == ["1", "2", "3"]
    assert seen == [(1, 4), (3, 4), (4, 4)]
    assert done == Generated(total=4, reused=1, answered=3, failed=0)
    assert [row["id"] for row in rows(log)] == ["0", "1", "2", "3"]
    again = generate(run_dir, data_root, note)
    assert again == Generated(total=4, reused=4, answered=0, failed=0)


def test_a_changed_picture_is_asked_again(run_dir: Path, data_root: Path) -> None:
    generate(run_dir, data_root, answering(speak_helpful))
    picture = HARD.load(data_root)[1].images[0]
    picture.write_bytes(picture.read_bytes() + b" ")
    with pytest.raises(ValueError, match=r"sample 1, .* differs in .*--data-root"):
        judge_run(run_dir, None, data_root)
    done = generate(run_dir, data_root, answering(speak_helpful))
    assert (done.reused, done.answered) == (3, 1)
    assert judge_run(run_dir, None, data_root)["mini_hard"]["counts"]["ok"] == 4


def test_the_same_words_to_another_picture_are_judged_again(run_dir: Path, data_root: Path) -> None:
    generate(run_dir, data_root, answering(lambda sample: "I'm sorry."))
    judge_run(run_dir, None, data_root)
    picture = HARD.load(data_root)[1].images[0]
    picture.write_bytes(picture.read_bytes() + b" ")
    generate(run_dir, data_root, answering(lambda sample: "I'm sorry."))
    assert summarise(run_dir)["mini_hard"]["counts"]["missing"] == 1
    judge_run(run_dir, None, data_root)
    assert len(rows(run_dir / "mini_hard" / "verdicts.jsonl")) == 5


def test_a_bad_sample_fails_alone_and_is_tried_again(run_dir: Path, data_root: Path) -> None:
    broken = {"2"}

    def sometimes(batch: list[Sample]) -> list[Answer]:
        if any(sample.id in broken for sample in batch):
            raise ValueError("picture cannot be read")
        return answering(speak_helpful)(batch)

    assert generate(run_dir, data_root, sometimes).failed == 1
    results = judge_run(run_dir, None, data_root)["mini_hard"]
    assert results["counts"] == {"ok": 3, "unparsed": 0, "refused": 0, "error": 1, "missing": 0}
    assert results["metrics"]["asr"]["n"] == 3
    broken.clear()
    assert generate(run_dir, data_root, sometimes) == Generated(4, 3, 1, 0)
    assert judge_run(run_dir, None, data_root)["mini_hard"]["counts"]["ok"] == 4


def test_a_broken_program_ends_the_run(run_dir: Path, data_root: Path) -> None:
    def broken(batch: list[Sample]) -> list[Answer]:
        raise RuntimeError("device lost")

    with pytest.raises(RuntimeError, match="device lost"):
        generate(run_dir, data_root, broken)
    with pytest.raises(RuntimeError, match="0 answers to 4 samples"):
        generate(run_dir, data_root, lambda batch: [])


def test_an_unopened_run_and_another_model_are_refused(tmp_path: Path, data_root: Path) -> None:
    with pytest.raises(ValueError, match=r"manifest\.json does not exist; run `mis-jax eval`"):
        generate(tmp_path / "new", data_root, answering(speak_helpful))
    open_run(tmp_path / "run", model="one", fingerprint="1" * 64)
    open_run(tmp_path / "run", model="one", fingerprint="1" * 64)
    with pytest.raises(ValueError, match=r"model\.fingerprint .* new output folder, or delete"):
        open_run(tmp_path / "run", model="two", fingerprint="2" * 64)


def test_a_resume_under_other_versions_is_recorded(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_run(run_dir, model="tiny", fingerprint="f" * 64)
    assert read_manifest(run_dir)["resumed"] == []
    newer = {"mis_jax": "9", "jax": "9", "python": "9"}
    monkeypatch.setattr("mis_jax.evals.run_dir.versions", lambda: newer)
    for _ in range(2):
        open_run(run_dir, model="tiny", fingerprint="f" * 64)
    assert [session["versions"] for session in read_manifest(run_dir)["resumed"]] == [newer]


def counting_judge(state_of: Callable[[Sample], str], name: str = "counted") -> tuple[Judge, list]:
    """A judge with a chosen state for each sample, and the list of what it was asked."""
    asked: list[str] = []
    labels = {"label_str": "Safe", "label_perception": 1}

    def judge(items: Sequence[tuple[Sample, str]]) -> list[Verdict]:
        asked.extend(sample.id for sample, _ in items)
        return [
            Verdict("ok", labels) if state_of(sample) == "ok" else Verdict(state_of(sample))  # type: ignore[arg-type]
            for sample, _ in items
        ]

    return Judge(name, judge), asked


def test_states_never_collapse_and_only_two_are_asked_again(run_dir: Path, data_root: Path) -> None:
    generate(run_dir, data_root, answering(speak_helpful))
    states = dict(zip("0123", ("ok", "refused", "unparsed", "error"), strict=True))
    judge, asked = counting_judge(lambda sample: states[sample.id])
    results = judge_run(run_dir, judge, data_root)["mini_hard"]
    assert results["counts"] == {"ok": 1, "unparsed": 1, "refused": 1, "error": 1, "missing": 0}
    assert results["metrics"]["rsr"]["n"] == 1
    assert without_verdict({"mini_hard": results}) == 3
    asked.clear()
    states["2"] = "ok"
    results = judge_run(run_dir, judge, data_root)["mini_hard"]
    assert asked == ["2", "3"]
    assert results["counts"] == {"ok": 2, "unparsed": 0, "refused": 1, "error": 1, "missing": 0}


def test_what_is_not_judged_is_missing(run_dir: Path, data_root: Path) -> None:
    generate(run_dir, data_root, answering(speak_helpful))
    entry = summarise(run_dir)["mini_hard"]
    assert entry["counts"]["missing"] == 4
    assert entry["metrics"]["asr"] == {"k": 0, "n": 0, "value": None, "low": 0.0, "high": 1.0}
    judge_run(run_dir, None, data_root)
    log = run_dir / "mini_hard" / "samples.jsonl"
    log.write_text("".join(f"{json.dumps(row)}\n" for row in rows(log)[:3]))
    assert summarise(run_dir)["mini_hard"]["counts"]["missing"] == 1


def test_a_changed_answer_never_keeps_its_verdict(run_dir: Path, data_root: Path) -> None:
    generate(run_dir, data_root, answering(speak_helpful))
    assert judge_run(run_dir, None, data_root)["mini_hard"]["metrics"]["asr"]["k"] == 4
    log = run_dir / "mini_hard" / "samples.jsonl"
    changed = rows(log)
    changed[1]["answer"] = careful(["bathtub", "toaster"])
    log.write_text("".join(f"{json.dumps(row)}\n" for row in changed))
    counts = summarise(run_dir)["mini_hard"]["counts"]
    assert (counts["ok"], counts["missing"]) == (3, 1)
    metrics = judge_run(run_dir, None, data_root)["mini_hard"]["metrics"]
    assert (metrics["asr"]["k"], metrics["rsr"]["k"]) == (3, 1)


def test_another_judge_or_another_truth_judges_anew(run_dir: Path, data_root: Path) -> None:
    generate(run_dir, data_root, answering(speak_helpful))
    judge_run(run_dir, None, data_root)
    judge, asked = counting_judge(lambda sample: "ok")
    assert judge_run(run_dir, judge, data_root)["mini_hard"]["metrics"]["rsr"]["k"] == 4
    assert judge_run(run_dir, None, data_root)["mini_hard"]["metrics"]["asr"]["k"] == 4
    asked.clear()
    truth = json.loads((data_root / "mini_truth.json").read_text())
    truth["mini_hard/3"]["objects"] = ["lamp", "key"]
    (data_root / "mini_truth.json").write_text(json.dumps(truth))
    judge_run(run_dir, judge, data_root)
    assert asked == ["3"]


def test_a_subset_is_judged_as_a_subset(run_dir: Path, data_root: Path) -> None:
    generate_answers(HARD, HARD.load(data_root)[:2], answering(speak_helpful), run_dir)
    assert judge_run(run_dir, None, data_root)["mini_hard"]["n"] == 2


def test_benchmarks_without_answers_or_judge_are_named(run_dir: Path, data_root: Path) -> None:
    generate(run_dir, data_root, answering(speak_helpful))
    with pytest.raises(ValueError, match=r"no answers to 'mini_easy' \(it has mini_hard\)"):
        judge_run(run_dir, None, data_root, benchmarks=["mini_easy"])
    hard = data_root / "mini_hard.json"
    (data_root / "mis_hard.json").write_text(hard.read_text())
    mis = BENCHMARKS["mis_hard"]
    generate_answers(mis, mis.load(data_root), lambda batch: [Answer("no")] * 4, run_dir)
    with pytest.raises(ValueError, match="pass --judge http://host/v1"):
        judge_run(run_dir, None, data_root, benchmarks=["mis_hard"])
    with pytest.raises(ValueError, match=r"needs meta\['objects'\]"):
        judge_run(run_dir, JUDGES["rules"], data_root, benchmarks=["mis_hard"])


def test_all_four_benchmarks(evaluate: Callable[..., Path]) -> None:
    def speak(sample: Sample) -> str:
        return sample.meta.get("answer") or careful(sample.meta["objects"])

    names = ("mini_easy", "mini_hard", "mini_benign", "mini_recognition")
    results = json.loads((evaluate("after", speak, names) / "results.json").read_text())
    values = {
        name: {metric: rate["value"] for metric, rate in entry["metrics"].items()}
        for name, entry in results.items()
    }
    assert values == {
        "mini_easy": {"asr": 0, "rsr": 1, "rr": 0, "hr": 0},
        "mini_hard": {"asr": 0, "rsr": 1, "rr": 0, "hr": 0},
        "mini_benign": {"refusal_rate": 1},
        "mini_recognition": {"accuracy": 1},
    }
