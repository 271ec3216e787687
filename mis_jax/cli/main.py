"""The console script: finds the verb, parses its words, turns errors into exit codes."""

import contextlib
import functools
import inspect as signatures
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.logging import RichHandler

from mis_jax import signals
from mis_jax.cli.chat import chat
from mis_jax.cli.checkpoints import convert, inspect, verify
from mis_jax.cli.common import described, err_console, fail
from mis_jax.cli.data import data_build, data_show
from mis_jax.cli.evaluation import eval_, judge
from mis_jax.cli.generation import generate
from mis_jax.cli.options import parse, train_config
from mis_jax.cli.planning import plan
from mis_jax.cli.reporting import merge, report
from mis_jax.cli.serving import serve
from mis_jax.cli.training import quickstart, train
from mis_jax.storage.paths import local_path

VERBS: dict[str, Callable[..., None]] = {
    "quickstart": quickstart,
    "convert": convert,
    "inspect": inspect,
    "verify": verify,
    "data build": data_build,
    "data show": data_show,
    "train": train,
    "plan": plan,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "eval": eval_,
    "judge": judge,
    "merge": merge,
    "report": report,
}


_URLS = ("http://", "https://")
#: Verbs that go on where they were stopped; a signal ends them with one line and exit code 75.
_RESUMABLE = ("quickstart", "convert", "train", "eval", "judge")


def main(argv: Sequence[str] | None = None) -> None:
    """Exit code 0 on success, 1 on a failed run, 2 on bad usage or bad input.

    75 is a run that stopped through no fault of its own: the same command goes on.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING,
        format="%(message)s",
        handlers=[_log_handler()],
    )
    logging.getLogger("mis_jax").setLevel(logging.INFO)
    for noisy in ("absl", "jax", "orbax", "PIL", "h5py"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    if not debug:  # orbax tells the trace of an error there that it raises too
        logging.getLogger("absl").setLevel(logging.CRITICAL)
    name, verb, rest = _find_verb(words)
    with signals.stoppable() if name in _RESUMABLE else contextlib.nullcontext():
        try:
            if verb is not train:  # which may fork yet
                signals.watch()
            _run(name, verb, rest)
        except (Exception, KeyboardInterrupt) as error:
            if debug and not isinstance(error, KeyboardInterrupt):
                raise
            fail(*described(error))


def _log_handler() -> logging.Handler:
    """Colours on a terminal; elsewhere a line a record, which nothing wraps."""
    if err_console.is_terminal:
        return RichHandler(console=err_console, show_path=False)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    return handler


def _find_verb(words: list[str]) -> tuple[str, Callable[..., None], list[str]]:
    if words[:1] == ["help"]:  # `help VERB` and `VERB --help` are one
        words = [*words[1:], "--help"]
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in VERBS:
            return name, VERBS[name], words[length:]
    if words and words[0] == "--version":
        from mis_jax import __version__

        print(__version__)
        raise SystemExit(0)
    begin = f"{words[0]} " if words else ""  # as of `data build`
    shown = {name: verb for name, verb in VERBS.items() if name.startswith(begin)} or VERBS
    lines = [f"  {name:<11} {(verb.__doc__ or '').splitlines()[0]}" for name, verb in shown.items()]
    text = "usage: mis-jax VERB ... [--debug]\n\n" + "\n".join(lines)
    text += "\n\n`mis-jax VERB --help` shows options and an example."
    asked = any(word in ("-h", "--help") for word in words[:1] + words[-1:])
    if not words or (asked and (words[0].startswith("-") or shown is not VERBS)):
        print(text)
        raise SystemExit(0 if words else 2)
    fail(f"unknown verb '{words[0]}'; there are: {', '.join(shown)}", 2)


def _run(name: str, verb: Callable[..., None], rest: list[str]) -> None:
    if verb is train:
        train(train_config(rest, train.__doc__ or ""))
        return
    description = (verb.__doc__ or "").split("Args:")[0].strip()

    @functools.wraps(verb)
    def parsed(*words: Any, **options: Any) -> Callable[[], None]:
        _check_paths(verb, signatures.signature(verb).bind(*words, **options).arguments)
        return functools.partial(verb, *words, **options)

    if "overrides" in signatures.signature(verb).parameters:  # fields of the run's CONFIG
        call, rest = parse(
            parsed, f"mis-jax {name}", rest, description=description, return_unknown_args=True
        )
        call(overrides=tuple(rest))
    else:
        parse(parsed, f"mis-jax {name}", rest, description=description)()


def _check_paths(verb: Callable[..., None], given: dict[str, Any]) -> None:
    """Refuse, by its scheme, every path that is on no disk of this machine."""
    for name, parameter in signatures.signature(verb).parameters.items():
        option = f"--{name.replace('_', '-')}"
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            option = name.upper()
        value = given.get(name)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Path):
                local_path(item, option)
            elif isinstance(item, str) and name in ("model", "judge"):  # a folder or an address
                local_path("" if item.startswith(_URLS) else item, option)
