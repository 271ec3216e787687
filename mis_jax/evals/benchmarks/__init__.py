"""Every benchmark by its id. A new one is a file beside this one that holds `BENCHMARKS`, or one of
the user's own anywhere (`add_file`).

An id with a control behind it (`mis_hard@black`) is that benchmark with its images or words
changed; see `mis_jax/evals/controls.py`.
"""

import pkgutil
import re
import runpy
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from mis_jax.evals.controls import CONTROLS, control_of
from mis_jax.evals.judges import JUDGES
from mis_jax.evals.judges.prompts import PROTOCOLS
from mis_jax.evals.outcomes import METRICS
from mis_jax.evals.types import Benchmark, Sample
from mis_jax.storage.files import os_error_text
from mis_jax.storage.paths import local_path


def _registered() -> dict[str, Benchmark]:
    """What the files of this folder define, in the order of their names."""
    benchmarks: dict[str, Benchmark] = {}
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
        defined = getattr(import_module(f"{__name__}.{module.name}"), "BENCHMARKS", ())
        for benchmark in defined:
            assert benchmark.name not in benchmarks, f"two benchmarks are called {benchmark.name}"
            benchmarks[benchmark.name] = benchmark
    return benchmarks


BENCHMARKS: dict[str, Benchmark] = _registered()
_OWN_FILES: dict[str, str] = {}
_NAME = re.compile(r"[A-Za-z0-9_-]+")


def add_file(path: Path) -> None:
    """Register what a Python file of the user's own holds as `BENCHMARKS`.

    The file is run, so it must be named by the user and never by a run or a data set.
    """
    where = str(local_path(path, "--benchmark-file").absolute())
    try:
        defined = runpy.run_path(where).get("BENCHMARKS")
    except (Exception, SystemExit) as error:
        known = isinstance(error, OSError)
        reason = os_error_text(error) if known else f"{type(error).__name__}: {error}"
        raise ValueError(f"--benchmark-file {path} cannot be run: {reason}") from error
    if not isinstance(defined, list | tuple) or not defined:
        raise ValueError(f"--benchmark-file {path} holds no list BENCHMARKS of Benchmark objects")
    for benchmark in defined:
        _check_own(benchmark, f"--benchmark-file {path}", where)
    if len({benchmark.name for benchmark in defined}) < len(defined):
        raise ValueError(f"--benchmark-file {path}: two of its BENCHMARKS have one name")
    for benchmark in defined:
        BENCHMARKS[benchmark.name] = benchmark
        _OWN_FILES[benchmark.name] = where


def _check_own(benchmark: Any, origin: str, where: str) -> None:
    if not isinstance(benchmark, Benchmark) or not _NAME.fullmatch(benchmark.name):
        raise ValueError(
            f"{origin}: BENCHMARKS holds {benchmark!r:.80}, which is no Benchmark with a name of "
            "letters, digits, _ and -"
        )
    if benchmark.name in BENCHMARKS and _OWN_FILES.get(benchmark.name) != where:
        raise ValueError(f"{origin}: a benchmark {benchmark.name!r} exists; choose another name")
    if benchmark.default_judge not in (None, *JUDGES):
        raise ValueError(
            f"{origin}: {benchmark.name!r} has the unknown judge {benchmark.default_judge!r}; "
            f"known are {', '.join(JUDGES)}, and None for a judge that --judge names"
        )
    if unknown := [name for name in benchmark.judging.split("+") if name not in PROTOCOLS]:
        raise ValueError(
            f"{origin}: {benchmark.name!r} has the unknown judging protocol {unknown[0]!r}; known "
            f"are {', '.join(PROTOCOLS)}"
        )
    if unknown := [metric for metric in benchmark.metrics if metric not in METRICS]:
        raise ValueError(
            f"{origin}: {benchmark.name!r} has the unknown metric {unknown[0]!r}; known are "
            f"{', '.join(METRICS)}"
        )


def own_file(name: str) -> str | None:
    """The user's file that defines a benchmark, or the benchmark of a control."""
    return _OWN_FILES.get(name.partition("@")[0])


def check_known(entries: Mapping[str, Mapping[str, Any]], manifest: Path) -> None:
    """ValueError for a benchmark of a run's manifest that nothing here defines."""
    for name, entry in entries.items():
        if is_benchmark(name):
            continue
        if file := entry.get("file"):
            raise ValueError(
                f"{manifest}: benchmark {name!r} is defined in {file}; give that file as "
                "--benchmark-file"
            )
        raise ValueError(
            f"{manifest}: benchmark {name!r} is unknown to this version; known are {known_names()}"
        )


def get_benchmark(name: str) -> Benchmark:
    """A benchmark or a control of one by id, or a `ValueError` that lists the known ones."""
    plain, at, control = name.partition("@")
    if not is_benchmark(name):
        raise ValueError(f"benchmark {name!r} is unknown; --benchmarks takes {known_names()}")
    return control_of(BENCHMARKS[plain], control) if at else BENCHMARKS[plain]


def is_benchmark(name: str) -> bool:
    """Whether the name is that of a benchmark, or of a control of one."""
    plain, at, control = name.partition("@")
    return plain in BENCHMARKS and (not at or control in CONTROLS)


def known_names() -> str:
    """The names that `get_benchmark` takes, for messages."""
    return f"{', '.join(BENCHMARKS)}, each also with {' or '.join(f'@{name}' for name in CONTROLS)}"


def in_order(names: Iterable[str]) -> list[str]:
    """The names as a report lists them: registered order, a control after its benchmark."""
    places = {name: place for place, name in enumerate(BENCHMARKS)}
    return sorted(names, key=lambda name: (places[name.partition("@")[0]], name))


def wordless_note(name: str, samples: Sequence[Sample]) -> str | None:
    """A sentence for questions that a published file leaves empty: asked, and said so."""
    wordless = sum(sample.meta.get("question") == "" for sample in samples)
    if not wordless:
        return None
    return f"{name}: {wordless} of {len(samples)} questions have no words; the image asks alone."


def size_note(name: str, n: int) -> str | None:
    """A sentence for a set whose size is not the published one: reported, never refused."""
    published = get_benchmark(name).published_size
    if published is None or published == n:
        return None
    return f"{name} has {n} samples here; the published set has {published}."
