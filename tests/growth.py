"""How much longer a reader takes for twice the text, told by ratio, whatever the machine does."""

import contextlib
import time
from collections.abc import Callable, Mapping


def seconds(reader: Callable[[str], object], text: str) -> float:
    """Of this thread, the least of several: other processes only ever add to it."""
    times = []
    for _ in range(7):
        start = time.thread_time()
        with contextlib.suppress(Exception):  # a refusal is an answer
            reader(text)
        times.append(time.thread_time() - start)
        if times[-1] > 1:
            break
    return min(times)


def words(text: str) -> str:
    """Plainly linear; what it takes more for twice the text is the machine's caches and memory."""
    return " ".join(text.lower().split())


def growth(reader: Callable[[str], object], begin: str, part: str, end: str, least: float) -> float:
    """How much longer twice the text takes, at a length where that can be measured.

    Over two doublings, and relative to `words`.
    """
    count = 500
    while (once := seconds(reader, begin + part * count + end)) < least:
        if count * len(part) > 200_000:  # a square of that would have taken minutes
            return 1.0
        count *= 2
    short, long = (begin + part * n + end for n in (count, 4 * count))
    machine = max(1.0, seconds(words, long) / seconds(words, short) / 4)
    return (seconds(reader, long) / once / machine) ** 0.5


def slow_texts(
    reader: Callable[[str], object],
    texts: Mapping[str, tuple[str, str, str]],
    *,
    least: float = 2e-4,
) -> dict[str, float]:
    """The texts (begin, what is repeated, end) whose double takes more than 2.3 times as long.

    `least` is the time from which on it is measured.
    """
    slow = {}
    for kind, parts in texts.items():
        ratios: list[float] = []
        while len(ratios) < 12 and not any(ratio <= 2.3 for ratio in ratios):
            ratios.append(growth(reader, *parts, least))
        if min(ratios) > 2.3:
            slow[kind] = min(ratios)
    return slow
