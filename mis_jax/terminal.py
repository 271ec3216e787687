"""What is shown while something runs: bars on a terminal, lines elsewhere."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_EVERY = 30.0  # seconds between two lines where there is no terminal
_WORTH_A_LINE = 5.0  # seconds that something took
_NEVER_WRAPPED = 10_000  # columns of what is piped: a path must stay in one piece


def open_console(*, stderr: bool = False) -> Console:
    """A console whose lines are wrapped on a terminal alone."""
    console = Console(stderr=stderr)
    if console.file.isatty():
        return console
    # FORCE_COLOR, which many CI systems set, makes rich take a pipe for a terminal of 80 columns.
    colors: Any = console.color_system
    return Console(stderr=stderr, width=_NEVER_WRAPPED, force_terminal=False, color_system=colors)


class _Display(Protocol):
    def add_task(self, description: str, *, total: float | None, note: str) -> Any: ...
    def update(self, task: Any, /, *, completed: float, total: float, note: str = "") -> None: ...


class Bars:
    """Callbacks that move the bars of one display."""

    def __init__(self, display: _Display):
        self._display = display

    def task(self, name: str) -> Callable[[int, int], None]:
        """A bar fed with (done, in all)."""
        task = self._display.add_task(name, total=None, note="")

        def show(done: int, total: int) -> None:
            self._display.update(task, completed=done, total=total)

        return show

    def answers(self, name: str) -> Callable[[int, int, int], None]:
        """A bar fed with (answers, in all, tokens made) that shows how fast tokens come."""
        task = self._display.add_task(name, total=None, note="")
        began = time.monotonic()

        def show(done: int, total: int, tokens: int) -> None:
            rate = tokens / max(time.monotonic() - began, 1e-9)
            self._display.update(task, completed=done, total=total, note=f"{rate:.1f} tokens/s")

        return show

    def training(self, name: str) -> Callable[[int, int, dict[str, float]], None]:
        """A bar fed with (step, steps in all, metrics) that shows the loss and how fast it goes."""
        task = self._display.add_task(name, total=None, note="")

        def show(step: int, steps: int, metrics: dict[str, float]) -> None:
            note = f"loss {metrics['loss']:.4f}  {metrics['samples_per_second']:.3g} samples/s"
            if "mfu" in metrics:
                note += f"  MFU {metrics['mfu']:.1%}"
            self._display.update(task, completed=step, total=steps, note=note)

        return show


@dataclass
class _Line:
    """What is known of a task."""

    name: str
    began: float
    completed: float = 0
    total: float | None = None
    note: str = ""


class _Lines:
    """A line of every task that is under way every `_EVERY` seconds, and of a long one its end.

    The first ones come while nothing is known yet: weights are read, programs are compiled.
    """

    def __init__(self, console: Console, show: Callable[[float], str]):
        self._console, self._show = console, show
        self._running: list[_Line] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._print_regularly, daemon=True)
        self._thread.start()

    def add_task(self, description: str, *, total: float | None, note: str) -> _Line:
        line = _Line(description, time.monotonic(), total=total, note=note)
        self._running.append(line)
        return line

    def update(self, task: _Line, *, completed: float, total: float, note: str = "") -> None:
        task.completed, task.total, task.note = completed, total, note
        if completed >= total and task in self._running:
            self._running.remove(task)
            if time.monotonic() - task.began > _WORTH_A_LINE:
                self._print(task)

    def end(self) -> None:
        """Print no more."""
        self._ended.set()
        self._thread.join()

    def _print_regularly(self) -> None:
        while not self._ended.wait(_EVERY):
            for line in list(self._running):
                self._print(line)

    def _print(self, line: _Line) -> None:
        seconds = round(time.monotonic() - line.began)
        if line.total is None:
            state = "under way"
        else:
            state = f"{self._show(line.completed)} of {self._show(line.total)}"
        words = (f"{line.name}: {state}", line.note, f"{seconds // 60}:{seconds % 60:02}")
        # Not by rich, which ends the program, and its stdout, where nobody reads any more.
        with suppress(OSError, ValueError):
            print("  ".join(filter(None, words)), file=self._console.file, flush=True)


@contextmanager
def _bars(
    console: Console, columns: tuple[ProgressColumn, ...], show: Callable[[float], str]
) -> Iterator[Bars]:
    if console.is_terminal:
        with Progress(*columns, console=console) as progress:
            yield Bars(progress)
        return
    lines = _Lines(console, show)
    try:
        yield Bars(lines)
    finally:
        lines.end()


@contextmanager
def steps_bar(console: Console) -> Iterator[Bars]:
    """Bars with elapsed and remaining time; they stay on the screen when the block ends."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:>16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with _bars(console, columns, "{:,.0f}".format) as bars:
        yield bars


@contextmanager
def bytes_bar(console: Console) -> Iterator[Bars]:
    """Bars that count bytes, with bytes a second and the time that is left."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:>16}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with _bars(console, columns, lambda size: decimal(int(size))) as bars:
        yield bars
