"""What a stage is about to ask for, in words, before it does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from mis_jax.evals.types import Benchmark, Sample


def answers_ahead(benchmark: Benchmark, samples: Sequence[Sample]) -> str:
    """What the answers of a benchmark can take at most."""
    n, pictures = len(samples), sum(len(sample.images) for sample in samples)
    tokens = n * benchmark.max_new_tokens
    return (
        f"{benchmark.name}: {n:,} samples with {pictures:,} pictures, "
        f"at most {tokens:,} tokens of answers"
    )


class TimeAhead:
    """Says once, early in a run, how long all of its answers will take.

    The first `at_once` answers are not timed, since loading and compiling are in them; the next
    as many are, a whole round of what is under way together. Nothing is said of a run that would
    be over in a minute, or is too short to tell.
    """

    def __init__(
        self,
        total: int,
        at_once: int,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._left, self._at_once, self._say, self._clock = total, at_once, say, clock
        self._made = self._made_before = 0
        self._began: float | None = None
        self._said = False

    def watch(self, progress: Callable[[int, int], None]) -> Callable[[int, int], None]:
        """The progress of one benchmark, listened to on its way."""
        before: int | None = None

        def show(done: int, total: int) -> None:
            nonlocal before
            progress(done, total)
            if before is not None:  # what is done at first was answered earlier, at no cost now
                self._made += done - before
            self._left -= done - (before or 0)
            before = done
            self._tell()

        return show

    def _tell(self) -> None:
        if self._said or self._made < self._at_once:
            return
        if self._began is None:
            self._began, self._made_before = self._clock(), self._made
            return
        timed = self._made - self._made_before
        if timed < self._at_once:
            return
        self._said = True
        seconds = (self._clock() - self._began) / timed * self._left
        if seconds > 60:
            self._say(
                f"about {_duration(seconds)} for the {self._left:,} answers that are left, "
                f"if they take as long as {timed:,} of the first"
            )


def verdicts_ahead(
    name: str,
    judge: str,
    calls: int,
    tokens: int,
    pictures: int,
    seconds: float,
) -> str:
    """What the verdicts of a benchmark will take of a judge that is paid for."""
    if not calls:
        return f"{name}: nothing to judge with {judge}"
    return (
        f"{name}: {calls:,} calls of {judge}, about {tokens:,} tokens of text and "
        f"{pictures:,} pictures; about {_duration(seconds)}"
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"
