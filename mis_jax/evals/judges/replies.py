"""What a language model must answer as a judge, and how its answer is read.

A judge fills in a few fields, each with one of a few words. Reading is strict: a field that is
missing, said twice in two ways, or filled with another word leaves the answer unparsed. There is
no guess and no search for words in free text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mis_jax.parsing import parse_json

Mode = Literal["json_schema", "json_object", "text"]
MODES: tuple[Mode, ...] = ("json_schema", "json_object", "text")

PARSER = "replies-1"
"""Name of this way of reading; raise the number when it reads anything differently."""


@dataclass(frozen=True)
class Field:
    """One thing that a judge decides: the words it may use, and the labels that each means."""

    name: str
    question: str
    words: Mapping[str, tuple[str, Mapping[str, Any]]]
    """Word -> (what it stands for, labels)."""


def schema(fields: Sequence[Field]) -> dict[str, Any]:
    """The JSON schema of an answer, in the strict form that OpenAI asks for."""
    return {
        "type": "object",
        "properties": {
            field.name: {"type": "string", "enum": list(field.words)} for field in fields
        },
        "required": [field.name for field in fields],
        "additionalProperties": False,
    }


def response_format(mode: Mode, name: str, fields: Sequence[Field]) -> dict[str, Any]:
    """What a request says about the form of its answer; nothing where it is plain text."""
    if mode == "text":
        return {}
    if mode == "json_object":
        return {"response_format": {"type": "json_object"}}
    described = {"name": name, "strict": True, "schema": schema(fields)}
    return {"response_format": {"type": "json_schema", "json_schema": described}}


def instruction(mode: Mode, fields: Sequence[Field]) -> str:
    """What the judge is told to decide, and in which form."""
    lines = []
    for field in fields:
        lines.append(f"{field.name}: {field.question}")
        lines += [f"- {word}: {meaning}" for word, (meaning, _) in field.words.items()]
        lines.append("")
    names = [field.name for field in fields]
    if mode == "text":
        lines.append("Answer with nothing but these lines, one word of the list behind each name:")
        lines += [f"{name}: ..." for name in names]
    else:
        shape = json.dumps(dict.fromkeys(names, "..."))
        lines.append(
            f"Answer with nothing but a JSON object of the form {shape}, with one word of the list "
            "in each place, written as it stands there."
        )
    return "\n".join(lines)


def read(mode: Mode, fields: Sequence[Field], text: str) -> tuple[dict[str, Any] | None, str]:
    """The labels in a judge's answer, or None; and what is wrong with it."""
    said = text.rpartition("</think>")[2].strip()
    if not said:
        return None, "the judge said nothing"
    said = _without_fence(said)
    if mode == "text" and not said.startswith("{"):
        found, problem = _lines(fields, said)
    else:
        found, problem = _object(said)
    if problem:
        return None, problem
    labels: dict[str, Any] = {}
    if others := found.keys() - {field.name for field in fields}:
        return None, f"{sorted(others)[0]!r:.80} was not asked for"
    for field in fields:
        if field.name not in found:
            return None, f"{field.name!r} is missing"
        word = found[field.name]
        if not isinstance(word, str) or word not in field.words:
            return None, f"{field.name!r} is {word!r:.80}, none of {', '.join(field.words)}"
        labels |= field.words[word][1]
    return labels, ""


def _without_fence(said: str) -> str:
    """What stands between ``` or ```json on a line of its own and ``` at the end."""
    if len(said) < 6 or not (said.startswith("```") and said.endswith("```")):
        return said
    mark, line_end, body = said[3:-3].partition("\n")
    return body.strip() if line_end and mark.strip() in ("", "json") else said


def _object(said: str) -> tuple[dict[str, Any], str]:
    try:
        value = parse_json(said)
    except ValueError as error:
        return {}, f"it is no JSON ({error})"
    return (value, "") if isinstance(value, dict) else ({}, "it is no JSON object")


def _lines(fields: Sequence[Field], said: str) -> tuple[dict[str, Any], str]:
    """`name: word` lines; marks around them do not count, nor does the case of a word.

    Colon and word may stand on the lines below. No pattern is searched for, as a reply may be of
    any length.
    """
    found: dict[str, str] = {}
    lines = [line.strip() for line in said.split("\n") if line.strip()]
    for field in fields:
        words = {word.lower(): word for word in field.words}
        name = field.name.lower()
        for place, line in enumerate(lines):
            begin = line.lstrip(_MARKS + ">-")
            if not begin.lower().startswith(name):
                continue
            following = iter(lines[place + 1 : place + _MOST_LINES])
            rest = begin[len(name) :].lstrip(_MARKS)
            while not rest and (after := next(following, "")):
                rest = after.lstrip(_MARKS)
            if not rest.startswith((":", "=")) or not (
                said_word := rest[1:].strip() or next(following, "")
            ):
                continue
            word = words.get(said_word.strip("*_`\"'. ").lower(), said_word)
            if found.setdefault(field.name, word) != word:
                return {}, f"{field.name!r} is said twice: {found[field.name]!r} and {word!r:.80}"
    return found, ""


_MARKS = "*_` \t"  # around a name
_MOST_LINES = 8  # from a name to its word
_DECLINED = re.compile(
    r"(?:i(?:'|’)?m sorry|i am sorry|sorry|i apologi[sz]e)\b"
    r"|(?:(?:unfortunately|no),? )?i(?: can(?:'|’)?t| cannot| can not| won(?:'|’)?t| will not"
    r"|(?:'|’)m (?:not able|unable)| am (?:not able|unable)| must decline)\b",
    re.I,
)


def declines(text: str) -> bool:
    """Whether an answer that could not be read is the judge's own refusal to judge.

    It says nothing about the answer that was to be judged, and yields no label.
    """
    return _DECLINED.match(text.rpartition("</think>")[2].strip()) is not None
