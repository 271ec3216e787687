"""What reads text from outside takes twice the time for twice the text, whatever the text is."""

from collections.abc import Callable

import pytest
from growth import slow_texts

from mis_jax.evals.controls import without_images
from mis_jax.evals.judges import llm, reference_answers, rules
from mis_jax.evals.judges.prompts import PROTOCOLS
from mis_jax.evals.types import Sample
from mis_jax.evals.vlmevalkit.parquet import split_options

FIELDS = PROTOCOLS["mis"].fields
NAME = FIELDS[0].name
OPTIONS = {"A": "red", "B": "blue"}


def asked(text: str) -> Sample:
    return Sample("1", [{"role": "user", "content": text}], [], {})


READERS: dict[str, Callable[[str], object]] = {
    "a judge's lines": lambda text: llm.read("text", FIELDS, text),
    "a judge's JSON": lambda text: llm.read("json_object", FIELDS, text),
    "a judge that declines": llm.declines,
    "encourages": rules.encourages,
    "warns": rules.warns,
    "refuses": rules.refuses,
    "names objects": lambda text: rules.names_objects(text, ("kettle", "bathtub")),
    "perception": lambda text: rules.perception(text, ("kettle", "bathtub")),
    "an option": lambda text: reference_answers.infer(text, OPTIONS),
    "a short answer": reference_answers.normalise,
    "options of a question": lambda text: split_options("x", f"Q?\nOptions: A: {text}, B: b"),
    "markers of images": lambda text: without_images(asked(text)),
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


@pytest.mark.parametrize("name", READERS)
def test_twice_the_text_takes_twice_the_time(name: str) -> None:
    assert slow_texts(READERS[name], TEXTS) == {}
