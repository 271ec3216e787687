"""What a run tells where nobody looks at a terminal: a log file, a pod's output."""

import io
import time

import pytest
from rich.console import Console

from mis_jax import terminal
from mis_jax.terminal import bytes_bar, steps_bar


@pytest.fixture
def log(monkeypatch):
    monkeypatch.setattr(terminal, "_EVERY", 0.02)
    return Console(file=io.StringIO(), width=20)


def lines_of(log: Console) -> list[str]:
    return log.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]


def wait_for(log: Console, text: str) -> None:
    end = time.monotonic() + 10
    while not any(text in line for line in lines_of(log)):
        assert time.monotonic() < end, lines_of(log)
        time.sleep(0.01)


def test_lines_come_regularly_before_and_between_updates(log):
    with steps_bar(log) as bars:
        show = bars.training("training")
        wait_for(log, "training: under way  0:")
        show(3, 1068, {"loss": 2.5, "samples_per_second": 12.0})
        wait_for(log, "training: 3 of 1,068  loss 2.5000  12 samples/s  0:")  # not wrapped at 20
    printed = len(lines_of(log))
    time.sleep(0.1)
    assert len(lines_of(log)) == printed


def test_what_is_done_is_not_told_again(log, monkeypatch):
    monkeypatch.setattr(terminal, "_WORTH_A_LINE", 0.0)
    with bytes_bar(log) as bars:
        bars.task("converting")(3_000_000, 3_000_000)
        time.sleep(0.1)
    (line,) = lines_of(log)
    assert line.startswith("converting: 3.0 MB of 3.0 MB  0:")


def test_what_takes_no_time_says_nothing(log, monkeypatch):
    monkeypatch.setattr(terminal, "_EVERY", 30.0)
    with steps_bar(log) as bars:
        bars.task("looking at samples")(5, 5)
    assert lines_of(log) == []


def test_a_run_goes_on_where_nobody_reads_its_lines(monkeypatch):
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            writes.append(text)
            raise BrokenPipeError

    writes: list[str] = []
    monkeypatch.setattr(terminal, "_WORTH_A_LINE", 0.0)
    monkeypatch.setattr("os.dup2", lambda *descriptors: writes.append("stdout is gone"))
    with steps_bar(Console(file=Broken())) as bars:
        bars.task("training")(2, 2)
    (line,) = writes
    assert line.startswith("training: 2 of 2  0:")


def test_what_is_piped_is_never_wrapped_where_colours_are_forced(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    for variable in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(variable, raising=False)
    console = terminal.open_console()
    assert not console.is_terminal
    console.print("[red]" + "a" * 200)
    assert capsys.readouterr().out == f"\x1b[31m{'a' * 200}\x1b[0m\n"
