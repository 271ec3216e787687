"""generate, eval, judge and report from the command line, on the shipped tiny model."""

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from mis_jax.cli import main
from mis_jax.mini import files
from mis_jax.mini.icons import draw_scene
from mis_jax.quickstart import BASE_MODEL
from mis_jax.storage.locks import locked_folder

MODEL = str(BASE_MODEL)


def run(*words) -> int:
    """Exit code of a command."""
    try:
        main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(5)
    paths = [folder / "a.png", folder / "b.png"]
    for path, name in zip(paths, ("toaster", "banana"), strict=True):
        draw_scene(name, rng).save(path)
    return paths


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The mini world with a few rows of each set."""
    patch = pytest.MonkeyPatch()
    for name in ("TRAIN_ROWS", "EASY_ROWS", "HARD_ROWS", "BENIGN_ROWS", "RECOGNITION_ROWS"):
        patch.setattr(files, name, 12)
    patch.setattr(files, "GENERAL_ROWS", 20)
    folder = tmp_path_factory.mktemp("world") / "data"
    files.write_mini(folder)
    patch.undo()
    return folder


def test_generate_one(pictures, capsys):
    words = ["generate", MODEL, "--prompt", "What is in the second image?", "--json"]
    assert run(*words, "--image", pictures[0], "--image", pictures[1]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert list(answer) == ["text", "prompt_tokens", "completion_tokens", "finish_reason"]
    assert answer["text"] == "a banana" and answer["finish_reason"] == "stop"


def test_generate_with_a_seed(capsys):
    def answer(seed: int) -> str:
        words = ["--prompt", "Hello", "--temperature", "3", "--max-new-tokens", "8"]
        assert run("generate", MODEL, *words, "--seed", seed) == 0
        return capsys.readouterr().out

    assert answer(1) == answer(1) != answer(2)


def test_generate_many_resumes(pictures, tmp_path, capsys):
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    rows = [
        {"id": f"q{i}", "prompt": "What is in the image?", "images": [str(pictures[i % 2])]}
        for i in range(3)
    ]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["generate", MODEL, "--batch", questions, "--out", answers, "--max-new-tokens", "12"]
    assert run(*words) == 0
    first = answers.read_text()
    assert [json.loads(line)["id"] for line in first.splitlines()] == ["q0", "q1", "q2"]
    lines = first.splitlines(keepends=True)
    answers.write_text(lines[0] + lines[1][:20])  # killed while writing the second line
    assert run(*words) == 0
    assert answers.read_text() == first
    capsys.readouterr()


def test_answers_to_something_else_are_not_kept(pictures, tmp_path, capsys):
    """Another prompt, image, setting or model under the same ids: nothing stale, nothing lost."""
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    image = tmp_path / "image.png"
    image.write_bytes(Path(pictures[0]).read_bytes())

    def ask(*more, prompt="What is in the image?", model=MODEL) -> int:
        row = {"id": "q", "prompt": prompt, "images": [image.name]}
        questions.write_text(json.dumps(row) + "\n")
        words = ["--batch", questions, "--out", answers, "--max-new-tokens", "12"]
        return run("generate", model, *words, *more)

    assert ask() == 0
    first = answers.read_text()
    other = tmp_path / "other"
    assert run("convert", MODEL, other, "--format", "native") == 0
    capsys.readouterr()

    def refused(*more, **changes) -> None:
        assert ask(*more, **changes) == 2
        assert "the answer to 'q' is one to another prompt" in capsys.readouterr().err
        assert answers.read_text() == first

    refused(prompt="What else is in the image?")
    refused("--system", "none")
    refused("--temperature", "1")
    refused(model=other)
    image.write_bytes(Path(pictures[1]).read_bytes())
    refused()
    image.write_bytes(Path(pictures[0]).read_bytes())
    assert ask() == 0 and answers.read_text() == first


def test_an_image_that_is_missing_is_an_error_row_and_the_rest_is_answered(
    pictures, tmp_path, capsys
):
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    images = [str(pictures[0]), str(tmp_path / "gone.png"), str(pictures[1])]
    rows = [
        {"id": f"q{i}", "prompt": "What is in the image?", "images": [image]}
        for i, image in enumerate(images)
    ]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["generate", MODEL, "--batch", questions, "--out", answers, "--max-new-tokens", "12"]
    for _ in range(2):  # and again: still one row an id
        assert run(*words) == 1
        assert "1 row(s) with an error" in capsys.readouterr().err
        lines = {row["id"]: row for row in map(json.loads, answers.read_text().splitlines())}
        assert sorted(lines) == ["q0", "q1", "q2"] and answers.read_text().count("\n") == 3
        assert "gone.png does not exist" in lines["q1"]["error"]
        assert lines["q0"]["text"] and lines["q2"]["text"]
    (tmp_path / "gone.png").write_bytes(Path(pictures[0]).read_bytes())
    assert run(*words) == 0
    lines = {row["id"]: row for row in map(json.loads, answers.read_text().splitlines())}
    assert len(lines) == 3 and lines["q1"]["text"] == lines["q0"]["text"]


@pytest.mark.parametrize("text", ["my notes", "my notes\n", '{"id": "q", "mine": 1}\n', "[1]\n\n"])
def test_a_file_of_the_users_own_is_no_file_of_answers(tmp_path, capsys, text):
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    questions.write_text(json.dumps({"id": "q", "prompt": "What?"}))
    answers.write_text(text)
    assert run("generate", MODEL, "--batch", questions, "--out", answers) == 2
    assert "give another --out" in capsys.readouterr().err
    assert answers.read_text() == text


def test_line_separators_and_half_surrogates_in_a_file(tmp_path, capsys):
    """JSON allows U+2028 and a lone half of a pair in a text; neither ends a line or a run."""
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    texts = ["What is\u2028this\u2029 or\u0085that?", "What is \ud83d?", "What?"]
    rows = [{"id": f"q\u2028{i}", "prompt": text} for i, text in enumerate(texts)]
    written = [json.dumps(row, ensure_ascii="\ud83d" in row["prompt"]) for row in rows]
    questions.write_text("\n".join(written), encoding="utf-8")
    words = ["generate", MODEL, "--batch", questions, "--out", answers, "--max-new-tokens", "4"]
    for _ in range(2):
        assert run(*words) == 0
        lines = [json.loads(line) for line in answers.read_text("utf-8").split("\n")[:-1]]
        assert [line["id"] for line in lines] == [row["id"] for row in rows]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", MODEL], "--prompt"),
        (["generate", MODEL, "--prompt", "x", "--image", "none.png"], "none.png"),
        (["generate", "nowhere", "--prompt", "x"], "nowhere"),
        (["generate", MODEL, "--batch", "none.jsonl", "--out", "o.jsonl"], "none.jsonl"),
        (["eval", MODEL, "--benchmarks", "nope", "--data-root", ".", "--out", "x"], "nope"),
        (["judge", "nowhere"], "nowhere"),
        (["report", "nowhere", "--out", "x"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == []


def test_eval_judge_report(data, tmp_path, capsys):
    out, names = tmp_path / "run", "mini_hard,mini_benign,mini_recognition"
    words = ["eval", MODEL, "--benchmarks", names, "--data-root", data, "--out", out]
    assert run(*words) == 0
    before = (out / "mini_hard" / "samples.jsonl").read_text()
    assert run(*words) == 0  # nothing is asked again
    assert (out / "mini_hard" / "samples.jsonl").read_text() == before
    capsys.readouterr()
    assert run("judge", out, "--json") == 0
    results = json.loads(capsys.readouterr().out)
    assert results == json.loads((out / "results.json").read_text())
    assert results["mini_hard"]["n"] == 12 and set(results["mini_hard"]["metrics"]) == {
        "asr", "rsr", "rr", "hr",
    }  # fmt: skip
    assert results["mini_hard"]["metrics"]["asr"]["value"] >= 0.7
    assert run("report", out, "--out", tmp_path / "report") == 0
    written = sorted(path.name for path in (tmp_path / "report").iterdir())
    assert written == ["report.csv", "report.html", "report.json", "report.md", "report.tex"]
    assert "Sure, " not in (tmp_path / "report" / "report.html").read_text()  # redacted


def test_eval_refuses_another_model_in_the_same_run(data, tmp_path, capsys):
    words = ["--benchmarks", "mini_hard", "--data-root", data, "--out", tmp_path / "run"]
    assert run("eval", MODEL, *words) == 0
    assert run("convert", MODEL, tmp_path / "other", "--format", "native") == 0
    capsys.readouterr()
    assert run("eval", tmp_path / "other", *words) == 2
    assert "two models" in capsys.readouterr().err.replace("\n", " ")


def test_eval_and_judge_are_refused_while_another_process_writes_the_run(data, tmp_path, capsys):
    """Two of them would each leave out of the manifest what the other enters."""
    words = ["eval", MODEL, "--benchmarks", "mini_benign", "--data-root", data, "--limit", 2]
    out = tmp_path / "run"
    assert run(*words, "--out", out) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with locked_folder(out):
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        for command in (
            [*words, "--out", out],
            ["judge", out],
            ["judge", out, "--judge", "none"],
        ):
            capsys.readouterr()
            assert run(*command) == 2
            error = capsys.readouterr().err
            assert f"run: another process is writing it (process {os.getpid()} on host " in error
    finally:
        done.set()
        thread.join()
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
