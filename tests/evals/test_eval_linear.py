"""What reads text from outside takes twice the time for twice the text, whatever the text is."""

import contextlib
import time
from collections.abc import Callable

import pytest

from mis_jax.evals.controls import without_pictures
from mis_jax.evals.judges import exact, replies, rules
from mis_jax.evals.judges.protocols import PROTOCOLS
from mis_jax.evals.types import Sample
from mis_jax.evals.vlmevalkit.matching import infer
from mis_jax.evals.vlmevalkit.parquet import split_options

FIELDS = PROTOCOLS["mis"].fields
NAME = FIELDS[0].name
OPTIONS = {"A": "red", "B": "blue"}


def asked(text: str) -> Sample:
    return Sample("1", [{"role": "user", "content": text}], [], {})


READERS: dict[str, Callable[[str], object]] = {
    "a judge's lines": lambda text: replies.read("text", FIELDS, text),
    "a judge's JSON": lambda text: replies.read("json_object", FIELDS, text),
    "a judge that declines": replies.declines,
    "encourages": rules.encourages,
    "warns": rules.warns,
    "refuses": rules.refuses,
    "names objects": lambda text: rules.names_objects(text, ("kettle", "bathtub")),
    "perception": lambda text: rules.perception(text, ("kettle", "bathtub")),
    "an option": lambda text: infer(text, OPTIONS),
    "a short answer": exact.normalise,
    "options of a question": lambda text: split_options("x", f"Q?\nOptions: A: {text}, B: b"),
    "markers of images": lambda text: without_pictures(asked(text)),
}
#: (begin, what is repeated, end)
TEXTS = {
    "new lines": ("```json\n", "\n", "x```"),
    "new lines after a name": (f"{NAME}:", "\n", "x"),
    "marks": ("", "* > - ` _\n", "x"),
    "spaces": (f"{NAME}: a", " ", "x"),
    "names": ("", f"{NAME}\n", ":"),
    "fences": ("", "```", "x"),
    "braces": ("{", '"a": {', "x"),
    "keep": ("", "keep ", "x"),
    "use": ("", "use it and mix ", "x"),
    "never": ("", "never, ", "x"),
    "danger": ("not ", "danger ", "x"),
    "commas": ("", ",", "danger"),
    "i can't": ("", "i can't ", "x"),
    "the first image": ("", "the first image ", "x"),
    "quotes": (".", ".\"')", "x"),
    "answer is": ("", "answer is ", "x"),
    "options": ("", "B: ", "x"),
    "lines of options": ("", " \n", "x"),
    "images": ("", "Image-1: ", "<image>"),
    "digits": ("Image-", "1", "x"),
    "marked images": ("", "<image>\n\n", "x"),
}


def seconds(reader: Callable[[str], object], text: str) -> float:
    """Of this thread, the least of several: other processes only ever add to it."""
    times = []
    for _ in range(7):
        start = time.thread_time()
        with contextlib.suppress(ValueError, RecursionError):  # a refusal is an answer
            reader(text)
        times.append(time.thread_time() - start)
        if times[-1] > 1:
            break
    return min(times)


def words(text: str) -> str:
    """Plainly linear; what it takes more for twice the text is the machine's caches and memory."""
    return " ".join(text.lower().split())


def growth(reader: Callable[[str], object], begin: str, part: str, end: str) -> float:
    """How much longer twice the text takes, at a length where that can be measured.

    Over two doublings, and relative to `words`.
    """
    count = 500
    while (once := seconds(reader, begin + part * count + end)) < 2e-4:
        if count * len(part) > 200_000:  # a square of that would have taken minutes
            return 1.0
        count *= 2
    short, long = (begin + part * n + end for n in (count, 4 * count))
    machine = max(1.0, seconds(words, long) / seconds(words, short) / 4)
    return (seconds(reader, long) / once / machine) ** 0.5


@pytest.mark.parametrize("name", READERS)
def test_twice_the_text_takes_twice_the_time(name: str) -> None:
    slow = {}
    for kind, parts in TEXTS.items():
        ratios = []
        while len(ratios) < 12 and not any(ratio <= 2.3 for ratio in ratios):
            ratios.append(growth(READERS[name], *parts))
        if min(ratios) > 2.3:
            slow[kind] = min(ratios)
    assert slow == {}
