"""Every benchmark by its id. A new one is a file beside this one that holds `BENCHMARKS`.

An id with a control behind it (`mis_hard@black`) is that benchmark with its images or words
changed; see `mis_jax/evals/controls.py`.
"""

import pkgutil
from collections.abc import Iterable, Sequence
from importlib import import_module

from mis_jax.evals.controls import CONTROLS, control_of
from mis_jax.evals.types import Benchmark, Sample


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
