"""Progress on the terminal."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class Bars:
    """Callbacks that move the bars of one `rich` display."""

    def __init__(self, progress: Progress):
        self._progress = progress

    def task(self, name: str) -> Callable[[int, int], None]:
        """A bar fed with (done, in all)."""
        task: TaskID = self._progress.add_task(name, total=None, note="")

        def show(done: int, total: int) -> None:
            self._progress.update(task, completed=done, total=total)

        return show

    def answers(self, name: str) -> Callable[[int, int, int], None]:
        """A bar fed with (answers, in all, tokens made) that shows how fast tokens come."""
        task: TaskID = self._progress.add_task(name, total=None, note="")
        began = time.monotonic()

        def show(done: int, total: int, tokens: int) -> None:
            rate = tokens / max(time.monotonic() - began, 1e-9)
            self._progress.update(task, completed=done, total=total, note=f"{rate:.1f} tokens/s")

        return show

    def training(self, name: str) -> Callable[[int, int, dict[str, float]], None]:
        """A bar fed with (step, steps in all, metrics) that shows the loss and how fast it goes."""
        task: TaskID = self._progress.add_task(name, total=None, note="")

        def show(step: int, steps: int, metrics: dict[str, float]) -> None:
            note = f"loss {metrics['loss']:.4f}  {metrics['samples_per_second']:.3g} samples/s"
            if "mfu" in metrics:
                note += f"  MFU {metrics['mfu']:.1%}"
            self._progress.update(task, completed=step, total=steps, note=note)

        return show


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
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield Bars(progress)


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
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield Bars(progress)
