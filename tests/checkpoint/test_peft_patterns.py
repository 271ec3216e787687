"""Patterns of an adapter match what PEFT's would, and in a time that grows with the name alone."""

import random
import re
import sys

import pytest

from mis_jax.checkpoint.peft.patterns import name_pattern

NAMES = [
    "q_proj", "model.layers.0.self_attn.q_proj", "model.layers.11.self_attn.k_proj", "xq_proj",
    "model.language_model.layers.1.mlp.up_proj", "language_model.q_proj", "a.b", "ab", "", "a", "b",
    "model.vision_tower.encoder.layer.0.attention.q_proj", "aab.b", "layers.3.q_proj.", "1.a",
]  # fmt: skip
KEYS = [
    "q_proj", "self_attn.*", r"layers\.1\.self_attn\.q_proj", "language_model.*q_proj", "k.proj",
    r"^model\.layers\.\d+\.self_attn\.[qk]_proj$", "(q|k|up)_proj", r"layers\.(0|11)\..*_proj",
    "(?:a|b)+", r"layers.[0-9]{1,2}.self_attn.(q_proj|k_proj)", "[^a-c]+", "a{2}b.b", "(ab|a)(b|)",
    "q_proj|k_proj", r"model\..*?\.q_proj", r"\w+", "a?b", "[]a]", r"\d+\.a", "^a", "a|", "x*",
]  # fmt: skip


def pefts(key: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", name) is not None


@pytest.mark.parametrize("key", KEYS)
def test_matches_as_peft(key):
    matches = name_pattern(key)
    assert {n: matches(n) for n in NAMES} == {n: pefts(key, n) for n in NAMES}


def test_random_patterns_match_as_peft():
    parts = ["a", "b", ".", r"\.", "a*", ".*", "b+", "a?", "(a|b)", "(ab|)", "[ab]", "a{1,2}", "|"]
    for seed in range(400):
        rng = random.Random(seed)
        key = "".join(rng.choices(parts, k=rng.randrange(1, 6)))
        matches = name_pattern(key)
        for _ in range(20):
            name = "".join(rng.choices("ab.", k=rng.randrange(8)))
            assert matches(name) == pefts(key, name), (key, name)


@pytest.mark.parametrize(
    "key",
    [
        "(a+)+", "(a|a*)*b", r"(a)\1", "(?=a)a", "(?!a)a", "(?<=a)a", "(?i)a", "(a", "a)", "[a",
        "*a", "a**", "a{101}", "a{1,9999}", "(" * 30 + "a" + ")" * 30, "a" * 1001, "\\", r"\Z",
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused(key):
    with pytest.raises(ValueError, match=r"\w|\W"):
        name_pattern(key)


HOSTILE = [
    ".*.*.*.*.*.*.*.*x", "(a|a)+x", "(a|b|ab)*x", r".+\..+\..+\..+x", "a*a*a*a*a*x", "(.|a)*x",
    "[a.]*[a.]*[a.]*x", "aaaa", "a.a.a.a", "(a|.a|a.){1,20}x",
]  # fmt: skip


def steps(key: str, name: str) -> int:
    """Bytecodes and calls of Python that a match takes, whatever else the machine does."""
    matches, count = name_pattern(key), 0

    def trace(frame, event, arg):
        nonlocal count
        frame.f_trace_opcodes = True
        count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        matches(name)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("key", HOSTILE)
@pytest.mark.parametrize("part", ["a", "a.", "."])
def test_twice_the_name_takes_twice_the_steps(key, part):
    short, long = (steps(key, part * n) for n in (100, 200))
    assert long / short <= 2.3
