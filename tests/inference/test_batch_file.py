"""Files of prompts: one that cannot be asked costs itself alone, and one process writes answers."""

import json

import pytest
from tiny_world import picture

from mis_jax.checkpoint.load import read_checkpoint
from mis_jax.checkpoint.nnx_state import build
from mis_jax.inference.batch_file import Settings, answer_file
from mis_jax.inference.offline import answer
from mis_jax.storage.locks import LOCK, locked

SETTINGS = Settings(max_new_tokens=4)


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint, tiny_processor):
    checkpoint = read_checkpoint(tiny_checkpoint)
    return build(checkpoint.config, checkpoint.arrays), tiny_processor


@pytest.fixture
def questions(tmp_path):
    """Five prompts: the third is longer than any context, the fourth has a torn picture."""
    (tmp_path / "torn.png").write_bytes(picture(tmp_path / "a.png", 60, 60, 1).read_bytes()[:200])
    rows = [
        {"id": "a", "prompt": "What is this?", "images": ["a.png"]},
        {"id": "b", "prompt": "And?"},
        {"id": "long", "prompt": "What is this? " * 40_000},
        {"id": "torn", "prompt": "What is this?", "images": ["torn.png"]},
        {"id": "c", "prompt": "Why?"},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path) -> dict[str, dict]:
    return {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}


def test_a_prompt_that_cannot_be_asked_costs_itself_alone(tiny, questions, tmp_path):
    out = tmp_path / "answers.jsonl"
    assert answer_file(*tiny, questions, out, SETTINGS, fingerprint="x") == 2
    rows = rows_of(out)
    assert rows.keys() == {"a", "b", "long", "torn", "c"}
    assert {name for name, row in rows.items() if "error" in row} == {"long", "torn"}
    assert f"{questions}, line 3: " in rows["long"]["error"]
    assert "exceed the context of" in rows["long"]["error"]
    assert str(tmp_path / "torn.png") in rows["torn"]["error"]
    before = {name: rows[name] for name in "abc"}
    # The next call asks for nothing but what failed, and puts it in its place once it is mended.
    text = questions.read_text().replace("What is this? " * 40_000, "What?")
    questions.write_text(text.replace("torn.png", "a.png"))
    assert answer_file(*tiny, questions, out, SETTINGS, fingerprint="x") == 0
    rows = rows_of(out)
    assert rows.keys() == {"a", "b", "long", "torn", "c"}
    assert before == {name: rows[name] for name in "abc"}


def test_what_is_wrong_with_all_prompts_ends_the_call(tiny, questions, tmp_path):
    out = tmp_path / "answers.jsonl"
    for settings in (Settings(max_new_tokens=0), Settings(max_tiles=0)):
        with pytest.raises(ValueError, match="give at least 1"):
            answer_file(*tiny, questions, out, settings, fingerprint="x")
    assert out.read_text() == ""


def test_answers_of_the_others_come_in_order(tiny):
    talks = [[{"role": "user", "content": text}] for text in ("a", "b " * 60_000, "c", "d")]
    told, failed = [], []
    found = answer(
        *tiny,
        talks,
        max_new_tokens=2,
        each=lambda index, _: told.append(index),
        failed=lambda index, why: failed.append((index, "context" in why)),
    )
    assert told == [0, 2, 3] and failed == [(1, True)] and len(found) == 3
    with pytest.raises(ValueError, match="exceed the context"):
        answer(*tiny, talks, max_new_tokens=2)


def test_one_process_writes_a_file_of_answers(tiny, questions, tmp_path, monkeypatch):
    import threading

    out, refused = tmp_path / "answers.jsonl", []

    def second() -> None:
        with pytest.raises(ValueError, match="another process is writing it") as caught:
            answer_file(*tiny, questions, out, SETTINGS, fingerprint="x")
        refused.append(str(caught.value))

    with locked(out.with_name(f".{out.name}{LOCK}"), out):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert refused and refused[0].startswith(f"{out}: ") and not out.exists()
    assert not list(tmp_path.glob("*.lock"))
