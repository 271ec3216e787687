"""What no JSON or YAML of outside may do: take memory without bound, or end in a bare error."""

import subprocess
import sys
from pathlib import Path

import pytest

from mis_jax.parsing import parse_json, parse_yaml

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 30)
)
BAD_JSON = {
    "deep lists": ("[" * 100_000, "nested deeper than 100"),
    "deep and whole": ("[1," * 101 + "1" + "]" * 101, "nested deeper than 100"),
    "deep objects": ('{"a":' * 300 + "1" + "}" * 300, "nested deeper than 100"),
    "endless number": ("1" * 5000, "a number of thousands of digits"),
    "not a number": ('{"a": NaN}', "NaN is no JSON"),
    "infinity": ("[-Infinity]", "-Infinity is no JSON"),
    "beyond float": ("[1e999]", "1e999 is beyond the numbers there are"),
    "two equal keys": ('[{"a": 1, "b": 2, "a": 3}]', "key 'a' stands twice in one object"),
    "no UTF-8": (b'"\xff"', "can't decode"),
    "nothing": ("", "Expecting value"),
}
BAD_YAML = {
    "laughs": (LAUGHS, "more than 20000 values, aliases counted"),
    "laughs by merging": (MERGES, "more than 20000 values, aliases counted"),
    "in itself": ("a: &a [*a]", "nested deeper than 100 levels, or in itself"),
    "a mapping in itself": ("a: &a {b: *a}", "nested deeper than 100 levels, or in itself"),
    "merged with itself": ("a: &a {<<: *a}", "nested deeper than 100 levels, or in itself"),
    "deep": ("[" * 50_000, "nested deeper than 100"),
    "deep blocks": ("".join(" " * n + "a:\n" for n in range(300)), "nested deeper than 100"),
    "endless number": ("a: " + "1" * 5000, "a number of more than 100 characters"),
    "number of base 60": ("a: " + ":".join("1" * 5000), "a number of more than 100 characters"),
    "no date": ("a: 2001-99-99", "month must be in"),
    "two equal keys": ("a: 1\nb: 2\na: 3", "key 'a' stands twice, again in line 3"),
    "long": ("# " + "x" * 2**20, "longer than 1048576 characters"),
    "a program": ("a: !!python/object/apply:os.system [x]", "could not determine a constructor"),
    "torn": ("a: [", "while parsing a flow"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_json_is_one_line(case):
    text, message = BAD_JSON[case]
    with pytest.raises(ValueError, match=message) as caught:
        parse_json(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("case", BAD_YAML)
def test_bad_yaml_is_one_line(case):
    text, message = BAD_YAML[case]
    with pytest.raises(ValueError, match=message) as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_what_is_meant_is_read():
    assert parse_json('{"a": [1, 2.5, null, true, "NaN"], "b": {}}') == {
        "a": [1, 2.5, None, True, "NaN"],
        "b": {},
    }
    assert parse_json("[NaN, Infinity]", finite=False)
    assert parse_json("[" * 100 + "]" * 100)
    assert parse_json(b'"\xed\xa0\xbd"') == "\ud83d"  # as our own logs write half a pair
    shared = parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: .inf}\nc: [*a, *a]")
    assert shared == {"a": {"x": 1}, "b": {"x": 1, "y": float("inf")}, "c": [{"x": 1}] * 2}
    assert parse_yaml("") is None


def test_aliases_take_no_memory():
    """30 levels of nine are 10^28 values; the process may have 800 MB."""
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_DATA, (3 << 28, 3 << 28))\n"
        "from tests.test_parsing import *\n"
        "for text in (LAUGHS, MERGES): pytest.raises(ValueError, parse_yaml, text)"
    )
    subprocess.run(
        [sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1], timeout=60
    )


def test_a_mark_in_front_is_no_part_of_a_document():
    """Windows editors write one at the start of a file, so of the first line of JSON lines."""
    assert parse_json('\ufeff{"a": 1}') == parse_json(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}
