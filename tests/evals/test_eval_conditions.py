"""Answers in 8 bits, or by an endpoint with settings of its own: kept apart and said."""

import json
from pathlib import Path

import pytest
from chat_server import MODEL, Say, serving
from eval_world import answering, careful

from mis_jax.cli import evaluation, main
from mis_jax.evals import models as engine_answers
from mis_jax.evals.benchmarks import BENCHMARKS
from mis_jax.evals.merge import merge_runs
from mis_jax.evals.report import write_report
from mis_jax.evals.run_dir import open_run, read_manifest
from mis_jax.evals.runner import generate_answers, judge_run
from mis_jax.inference.offline import Completion

HARD = BENCHMARKS["mini_hard"]


def run_cli(*words: object) -> int:
    try:
        main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def evaluated(folder: Path, data_root: Path, name: str, *conditions: str) -> Path:
    """A judged run of the model `m`."""
    open_run(folder, model="m", fingerprint="m", data_root=data_root, conditions=conditions)
    benchmark = BENCHMARKS[name]
    speak = answering(lambda sample: careful(sample.meta["objects"]))
    generate_answers(benchmark, benchmark.load(data_root), speak, folder)
    judge_run(folder, None, data_root)
    return folder


@pytest.fixture
def checkpoint(tmp_path, monkeypatch) -> tuple[Path, list]:
    """A folder that passes for a checkpoint, and what is asked of the engine in its place."""
    folder, seen = tmp_path / "model", []
    folder.mkdir()
    (folder / "weights").write_bytes(b"w")

    def load(path, dtype, mesh, *, adapter=None, int8=False, check_digests=True):
        seen.append({"int8_weights": int8})
        return None, None

    def answer(model, processor, conversations, images, *, int8_cache=False, **settings):
        seen[-1]["int8_cache"] = int8_cache
        return [Completion("Together they are dangerous.", 9, 5, "stop", ()) for _ in conversations]

    monkeypatch.setattr(evaluation, "load_quietly", load)
    monkeypatch.setattr(engine_answers, "answer", answer)
    return folder, seen


@pytest.mark.parametrize(
    ("flags", "protocol"),
    [
        ([], "mini-pairs-1"),
        (["--int8-weights"], "mini-pairs-1+int8-weights"),
        (["--int8-cache"], "mini-pairs-1+int8-cache"),
        (["--int8-weights", "--int8-cache"], "mini-pairs-1+int8-weights+int8-cache"),
    ],
)
def test_eight_bits_reach_the_engine_and_the_results(
    checkpoint, data_root: Path, tmp_path: Path, capsys, flags, protocol
) -> None:
    folder, seen = checkpoint
    out = tmp_path / "run"
    words = ["eval", folder, "--benchmarks", "mini_hard", "--data-root", data_root, "--out", out]
    assert run_cli(*words, *flags) == 0
    assert seen == [
        {"int8_weights": "--int8-weights" in flags, "int8_cache": "--int8-cache" in flags}
    ]
    assert read_manifest(out)["model"]["conditions"] == [flag.lstrip("-") for flag in flags]
    assert run_cli(*words, *flags) == 0  # resumed
    assert run_cli("judge", out) == 0
    assert json.loads((out / "results.json").read_text())["mini_hard"]["protocol"] == protocol
    capsys.readouterr()
    before = (out / "manifest.json").read_bytes()
    other = [] if flags else ["--int8-cache"]
    assert run_cli(*words, *other) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "do not mix" in err
    assert all(flag in err for flag in flags or other)
    assert (out / "manifest.json").read_bytes() == before and len(seen) == 2


def test_an_endpoint_s_own_settings_are_part_of_every_protocol(
    data_root: Path, tmp_path: Path, capsys
) -> None:
    out, words = tmp_path / "run", ["--benchmarks", "mini_hard,mini_benign"]
    with serving(lambda *_: Say("I'm sorry.")) as server:
        words = ["eval", server.url, "--model-name", MODEL, *words, "--data-root", data_root]
        assert run_cli(*words, "--out", out) == 0
        assert run_cli(*words, "--out", out, "--internvl-fields") == 2
        err = capsys.readouterr().err.splitlines()[-1]
        assert "do not mix" in err and "--internvl-fields" in err
        assert run_cli(*words, "--out", tmp_path / "told", "--internvl-fields") == 0
        assert run_cli(*words, "--out", tmp_path / "eight", "--int8-cache") == 2
        assert "not a server" in capsys.readouterr().err
    for run, mark in ((out, "+endpoint-settings"), (tmp_path / "told", "")):
        assert run_cli("judge", run, "--json") == 0
        results = json.loads(capsys.readouterr().out)
        assert {entry["protocol"] for entry in results.values()} == {"mini-pairs-1" + mark}


def test_reports_say_it_and_still_pair(data_root: Path, tmp_path: Path) -> None:
    plain = evaluated(tmp_path / "plain", data_root, "mini_hard")
    eight = evaluated(tmp_path / "eight", data_root, "mini_hard", "int8-cache")
    written = write_report([("plain", plain), ("eight", eight)], tmp_path / "report")
    texts = {path.suffix: path.read_text() for path in written}
    note = "eight was answered with keys and values in 8 bits."
    for suffix in (".md", ".html", ".json", ".tex"):
        assert note in texts[suffix], suffix
        assert "plain was answered" not in texts[suffix]
    assert "mini-pairs-1+int8-cache" in texts[".csv"]
    (test, *_) = json.loads(texts[".json"])["tests"]
    assert test["pairs"] == 4  # the same samples


def test_runs_under_different_conditions_do_not_merge(data_root: Path, tmp_path: Path) -> None:
    runs = [
        evaluated(tmp_path / "a", data_root, "mini_hard"),
        evaluated(tmp_path / "b", data_root, "mini_benign", "int8-weights"),
    ]
    with pytest.raises(ValueError, match="--int8-weights"):
        merge_runs(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_from_before_conditions_goes_on(data_root: Path, tmp_path: Path) -> None:
    run = evaluated(tmp_path / "run", data_root, "mini_hard")
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["model"]["conditions"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    evaluated(run, data_root, "mini_benign")
    with pytest.raises(ValueError, match="--int8-cache"):
        evaluated(run, data_root, "mini_easy", "int8-cache")
