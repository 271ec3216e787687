"""The one owner of JSON and YAML that come from outside: bounded, and one line on what is wrong.

Python's parsers take more than the formats say (NaN, two equal keys, numbers without an end), end
in a RecursionError where brackets are nested, and YAML's aliases make a gigabyte of a few lines.
"""

import json
import math
from typing import Any, NoReturn

import yaml

_DEEPEST = 100  # what is meant is below 10; Python's own functions give up near 1000
_LONGEST_YAML = 2**20  # characters
_LONGEST_NUMBER = 100  # characters
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_MOST_YAML = 20_000  # values, aliases written out; a run's configuration has under 200


def parse_json(text: str | bytes, *, finite: bool = True) -> Any:
    """The value of a JSON document; ValueError, without a file's name, where it is none.

    Without `finite` it may hold NaN and Infinity, as Python's own writer of metrics does. The mark
    (BOM) that Windows editors put in front of a text is no part of it.
    """
    if isinstance(text, str):
        text = text.removeprefix("\ufeff")  # of bytes, json takes it off itself
    try:
        value = json.loads(
            text,
            object_pairs_hook=_distinct,
            parse_float=_finite,
            parse_constant=_constant if finite else None,
        )
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        if str(error).startswith("Exceeds the limit"):
            raise ValueError("holds a number of thousands of digits") from None
        raise
    brackets = (b"[", b"{") if isinstance(text, bytes) else ("[", "{")
    if sum(text.count(bracket) for bracket in brackets) > _DEEPEST:  # type: ignore[arg-type]
        _check_depth(value)
    return value


def parse_yaml(text: str) -> Any:
    """The value of a YAML document of plain data; ValueError in one line where it is none."""
    if len(text) > _LONGEST_YAML:
        raise ValueError(f"longer than {_LONGEST_YAML} characters")
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_nodes(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise _too_deep() from None
    except yaml.YAMLError as error:
        # YAML's own has a picture of the place, in lines.
        raise ValueError(" ".join(str(error).split())) from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two equal keys either could be meant, and other readers take the other one."""
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {twice!r:.80} stands twice in one object")
    return result


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits:.40} is beyond the numbers there are")
    return value


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON; write a number or null")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise _too_deep()


def _check_nodes(root: yaml.Node) -> None:
    """Count what the document has once its aliases are written out; keys must differ."""
    waiting, count = [(root, 0)], 0
    while waiting:
        node, depth = waiting.pop()
        count += 1
        if depth > _DEEPEST:
            raise _too_deep()
        if count > _MOST_YAML:
            raise ValueError(f"has more than {_MOST_YAML} values, aliases counted")
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        line = key.start_mark.line + 1
                        raise ValueError(
                            f"key {key.value!r:.80} stands twice, again in line {line}"
                        )
                    seen.add(key.value)
                waiting += [(key, depth + 1), (value, depth + 1)]
        elif isinstance(node, yaml.ScalarNode) and node.tag in _NUMBERS:
            if len(node.value) > _LONGEST_NUMBER:  # 1:1:1 is one too, of base 60
                raise ValueError(f"holds a number of more than {_LONGEST_NUMBER} characters")
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(inner, depth + 1) for inner in node.value]


def _too_deep() -> ValueError:
    return ValueError(f"nested deeper than {_DEEPEST} levels, or in itself")
