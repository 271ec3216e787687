"""`mis-jax chat` in the terminal, with the shipped tiny model."""

import builtins

import pytest
from tiny_world import picture

from mis_jax.cli import main
from mis_jax.inference import model_runner
from mis_jax.quickstart import BASE_MODEL


def talk(monkeypatch, capsys, *lines: str) -> tuple[list[str], str]:
    """What is answered to the lines, and what stands on stderr."""
    waiting = iter(lines)

    def read(*prompt):
        line = next(waiting, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr(builtins, "input", read)
    main(["chat", str(BASE_MODEL), "--max-new-tokens", "8"])
    captured = capsys.readouterr()
    answers = [line.lstrip("> ").strip() for line in captured.out.splitlines()]
    return [line for line in answers if line], captured.err


def test_a_conversation_with_pictures(monkeypatch, capsys, tmp_path):
    first = picture(tmp_path / "first.png", 112, 112, 1)
    question = "What is in the picture?"
    ask_with_picture = (f"/image {first}", question)
    one, _ = talk(monkeypatch, capsys, *ask_with_picture)
    two, _ = talk(monkeypatch, capsys, *ask_with_picture, "Hello", "/clear", *ask_with_picture)
    assert len(one) == 1 and len(two) == 3
    assert one[0] == two[0] == two[2]  # forgotten


def test_what_goes_wrong_is_told_and_the_talk_goes_on(monkeypatch, capsys, tmp_path):
    answers, told = talk(
        monkeypatch, capsys, "/image none.png", "/what", "", "Hello <image>", "Hello", "/quit"
    )
    assert len(answers) == 1
    assert "none.png" in told and "/what is no command" in told and "image" in told


@pytest.mark.parametrize("word", ["/quit", ""])
def test_it_ends(monkeypatch, capsys, word):
    assert talk(monkeypatch, capsys, *([word] if word else []))[0] == []


def test_ctrl_c_ends_an_answer_and_not_the_talk(monkeypatch, capsys):
    """Also where it falls after the cache was given to the device and before it came back."""
    real, calls = model_runner.decode, []

    def interrupted(*words):
        made = real(*words)
        calls.append(words)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return made

    monkeypatch.setattr(model_runner, "decode", interrupted)
    answers, told = talk(monkeypatch, capsys, "Hello", "/clear", "Hello")
    assert "stopped" in told and len(calls) > 1
    monkeypatch.setattr(model_runner, "decode", real)
    assert talk(monkeypatch, capsys, "Hello")[0][-1] == answers[-1]
