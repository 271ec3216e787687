"""The words of a command: the parser, a run's YAML file with options over it, one-line errors."""

import contextlib
import dataclasses
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro
from tyro.conf import FlagCreatePairsOff

from mis_jax.cli.common import fail

_CHOICES = re.compile(r"\(('[^()]*')\)")  # tyro has them as a set
# What it says of a field that may be unset; after it come Python's names of the types.
_NO_TYPE = re.compile(
    r"no type matching (?:\{None\}\|)?(\S+) could be instantiated from \[(.*?)\].*"
)


def train_config(rest: list[str], about: str) -> Any:
    """CONFIG from YAML, overridden by `--field value`."""
    from mis_jax.config import DataConfig, RunConfig, Source, TrainConfig

    if rest and not rest[0].startswith("-"):
        loaded, rest = _loaded(Path(rest[0]), rest[1:]), rest[1:]
    elif any(word in ("-h", "--help") for word in rest):  # the options, with a stand-in for CONFIG
        sources = (Source("mis", root=Path("ROOT")),)
        loaded = RunConfig(
            Path("MODEL"), Path("OUTPUT"), DataConfig(sources=sources), TrainConfig(epochs=2)
        )
        for name in ("model", "output"):  # which have no defaults; the type is frozen
            object.__setattr__(loaded, name, tyro.MISSING)
    else:
        raise ValueError("the first argument is the YAML file of a run: mis-jax train CONFIG")
    description = (
        f"{about}\n\nExample: mis-jax train configs/mirage_8b.yaml --output runs/mine "
        "--optimizer.learning-rate 1e-5\n\nCONFIG is a YAML file; every option overrides one field."
    )
    return parse(RunConfig, "mis-jax train CONFIG", rest, default=loaded, description=description)


def run_config(path: Path, overrides: Sequence[str], verb: str) -> Any:
    """The configuration in a YAML file, for a verb that only looks at a run."""
    from mis_jax.config import RunConfig

    return parse(RunConfig, f"mis-jax {verb}", list(overrides), default=_loaded(path, overrides))


def _loaded(path: Path, overrides: Sequence[str]) -> Any:
    """A run's configuration, of whose epochs and steps the options may give the other one."""
    from mis_jax.config import load_config

    loaded = load_config(path)
    given = {word.partition("=")[0] for word in overrides}
    for name, other in (("steps", "epochs"), ("epochs", "steps")):
        if f"--train.{name}" in given and f"--train.{other}" not in given:
            train = dataclasses.replace(loaded.train, **{name: 1, other: None})
            return dataclasses.replace(loaded, train=train)
    return loaded


def parse(target: Callable[..., Any], program: str, words: list[str], **options: Any) -> Any:
    """tyro's parser, its boxed errors made one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                target, prog=program, args=words, config=(FlagCreatePairsOff,), **options
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        usage = program.removesuffix(" CONFIG")
        fail(f"{_unboxed(said.getvalue())} (see `{usage} --help`)", 2)


def _unboxed(text: str) -> str:
    """What tyro says in a box, in a line and without the help of the options that it names.

    Where the terminal has no frames, the box is one of blanks and dashes.
    """
    parts: list[list[str]] = [[]]
    for line in text.splitlines()[1:]:  # the first is the title
        inside = line[2:].rstrip("│ ")
        words = inside.strip()
        if line.startswith("╰") or inside.startswith(" " * 8):
            continue
        if words.startswith(("Argument helptext", "For full helptext")):
            break
        if not words.strip("─-"):
            parts.append([])
        else:
            parts[-1].append(words.split()[0] if words.startswith("--") else words)
    one = "; ".join(" ".join(part) for part in parts if part) or text.strip()
    one = _NO_TYPE.sub(r"\2 is no \1", one)
    return _CHOICES.sub(lambda found: ", ".join(sorted(found[1].split(", "))), one)
