"""What 8 bits cost: the tiny model's answers to the mini world with rounded kernels and cache.

The tiny model (`mis_jax/assets/mini`, before fine-tuning) answers the four benchmarks in float32,
and again with the decoder's kernels, the cache, or both in 8 bits. Told are the share of answers
that are the same to the letter, every benchmark's metrics, and the bytes of kernels and cache.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import jax
import tyro
from flax import nnx
from rich.console import Console
from rich.table import Table

from benchmarks.common import save
from mis_jax.api import load
from mis_jax.evals.benchmarks import get_benchmark
from mis_jax.evals.judges import get_judge
from mis_jax.inference.offline import answer
from mis_jax.mini.files import write_mini
from mis_jax.model.kv_cache import KVCache
from mis_jax.model.unrolled import unrolled

MINI = Path(__file__).parents[1] / "mis_jax" / "assets" / "mini"
BENCHMARKS = ("mini_easy", "mini_hard", "mini_benign", "mini_recognition")
KINDS = {
    "float32": (False, False),
    "int8 kernels": (True, False),
    "int8 cache": (False, True),
    "int8 kernels and cache": (True, True),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Example: python -m benchmarks int8 --save"""

    model: Path = MINI
    """Checkpoint folder; another one, such as a fine-tuned model, is as good."""
    samples: int = 200
    """Of every benchmark, at most."""
    save: bool = False
    """Write the figures into benchmarks/results."""


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    with tempfile.TemporaryDirectory(prefix="mis_jax_int8.") as folder:
        data = Path(folder) / "data"
        write_mini(data, 0)
        found = compare(settings, data)
    show(found)
    if settings.save:
        save("int8-mini", {"benchmark": "int8", "samples": settings.samples, "kinds": found})


def compare(settings: Settings, data: Path) -> dict[str, Any]:
    model, processor = load(settings.model, dtype="float32")
    found: dict[str, Any] = {}
    reference: list[str] = []
    for kind, (kernels, cache) in KINDS.items():
        rounded = unrolled(model, int8=kernels)
        texts: list[str] = []
        metrics: dict[str, float] = {}
        for name in BENCHMARKS:
            benchmark = get_benchmark(name)
            samples = benchmark.load(data)[: settings.samples]
            completions = answer(
                rounded,
                processor,
                [sample.conversation for sample in samples],
                [sample.images for sample in samples],
                max_new_tokens=benchmark.max_new_tokens,
                int8_cache=cache,
                batch_size=64,
            )
            said = [completion.text for completion in completions]
            judge = get_judge(benchmark.default_judge or "rules")
            verdicts = judge.judge(list(zip(samples, said, strict=True)))
            votes = [benchmark.outcomes(v.labels) for v in verdicts if v.state == "ok"]
            for metric in benchmark.metrics:
                of = [vote[metric] for vote in votes if metric in vote]
                metrics[f"{name} {metric}"] = sum(of) / len(of)
            texts += said
        reference = reference or texts
        same = sum(a == b for a, b in zip(texts, reference, strict=True)) / len(texts)
        dtype = "int8" if cache else "float32"
        whole = KVCache.zeros(model.config.text, slots=1, length=1024, dtype=dtype)
        found[kind] = {
            "same_answers": round(same, 4),
            "metrics": {key: round(value, 4) for key, value in metrics.items()},
            "layer_mib": mib(nnx.state(rounded.text.layers)),
            "cache_mib_of_1024_tokens": mib(whole),
        }
        print(kind, found[kind], flush=True)
    return found


def mib(tree: Any) -> float:
    return round(sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 2**20, 3)


def show(found: dict[str, Any]) -> None:
    table = Table(title="rounded to 8 bits, against float32")
    table.add_column("")
    for kind in found:
        table.add_column(kind, justify="right")
    rows = {"same answers": [f"{100 * kind['same_answers']:.1f} %" for kind in found.values()]}
    for metric in next(iter(found.values()))["metrics"]:
        rows[metric] = [f"{100 * kind['metrics'][metric]:.1f} %" for kind in found.values()]
    for name in ("layer_mib", "cache_mib_of_1024_tokens"):
        rows[name.replace("_", " ")] = [f"{kind[name]:.2f}" for kind in found.values()]
    for name, row in rows.items():
        table.add_row(name, *row)
    Console().print(table)


if __name__ == "__main__":
    main()
