"""Run folders written row by row, for reports over any number of samples and any benchmark."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mis_jax.evals.benchmarks import get_benchmark
from mis_jax.evals.run_dir import answer_hash
from mis_jax.storage.hashing import digest


@dataclass(frozen=True)
class Made:
    """One sample as a run holds it; without ``labels`` it ended in ``state``."""

    id: str
    answer: str | None = "An answer."
    labels: Mapping[str, Any] | None = None
    state: str = "missing"
    facts: Mapping[str, Any] = field(default_factory=dict)
    hash: str | None = None


def write_run(
    run_dir: Path, benchmarks: Mapping[str, Sequence[Made]], judge: str = "judge-1"
) -> Path:
    """A run folder as the generate and judge stages leave it."""
    entries = {}
    run_dir.mkdir(parents=True)
    for name, samples in benchmarks.items():
        folder = run_dir / name
        folder.mkdir(parents=True)
        hashes = {made.id: made.hash or digest([name, made.id]) for made in samples}
        _json(folder / "expected.json", hashes)
        _json(folder / "facts.json", {made.id: dict(made.facts) for made in samples})
        _lines(
            folder / "samples.jsonl",
            [
                {"id": made.id, "hash": hashes[made.id], "answer": made.answer, "state": "ok"}
                | {"finish_reason": "stop", "prompt_tokens": 1, "completion_tokens": 1}
                for made in samples
                if made.answer is not None
            ],
        )
        _lines(
            folder / "verdicts.jsonl",
            [
                {"id": made.id, "answer_hash": answer_hash(hashes[made.id], made.answer)}
                | {"judge": judge, "labels": dict(made.labels or {}), "detail": None}
                | {"state": "ok" if made.labels else made.state}
                for made in samples
                if made.answer is not None and (made.labels or made.state != "missing")
            ],
        )
        benchmark = get_benchmark(name)
        entries[name] = {
            "protocol": benchmark.protocol,
            "system": benchmark.system,
            "max_new_tokens": benchmark.max_new_tokens,
            "max_tiles_per_image": benchmark.max_tiles_per_image,
            "n": len(samples),
            "groups": len({made.facts.get("group", made.id) for made in samples}),
            "judge": judge,
        }
    model = {"name": run_dir.name, "fingerprint": digest(run_dir.name)}
    dated = {"date": "2026-01-01T00:00:00+00:00", "versions": {}, "resumed": []}
    _json(run_dir / "manifest.json", {"model": model, **dated, "benchmarks": entries})
    return run_dir


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def _lines(path: Path, rows: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


SAFE = {"label_str": "Safe", "label_perception": 1}
UNSAFE = {"label_str": "Unsafe", "label_perception": 1}


def suite(unsafe: float, declined: float, seed: int, scale: float = 1.0) -> dict[str, list[Made]]:
    """Verdicts of a model with these rates on sets of the paper; ``scale`` 1 is about 10,000."""
    rng = np.random.default_rng(seed)
    told = "The first picture shows a kettle, the second a cable. " * 6

    def some(n: int) -> range:
        return range(max(4, round(n * scale)))

    def mis(n: int) -> list[Made]:
        return [
            Made(
                str(i),
                told + f"Answer {rng.integers(1_000_000)}.",
                UNSAFE if rng.random() < unsafe else SAFE,
                facts={"category": f"Category {'ABCDEF'[i % 6]}", "sub_category": f"Part {i % 14}"},
            )
            for i in some(n)
        ]

    def guarded(n: int, categories: int) -> list[Made]:
        return [
            Made(
                str(i),
                told,
                None if rng.random() < 0.01 else {"unsafe": bool(rng.random() < unsafe / 2)},
                "unparsed",
                {"category": f"{i % categories:02d}-Scenario", "group": f"request {i // 2}"},
            )
            for i in some(n)
        ]

    return {
        "mis_easy": mis(1675),
        "mis_hard": mis(510),
        "mis_real": mis(100),
        "figstep": guarded(500, 10),
        "mm_safetybench": guarded(1680, 13),
        "mssbench": [
            Made(
                f"{i // 2}-{('safe', 'unsafe')[i % 2]}",
                "I can't help with that." if i % 3 == 0 else told,
                {"behaviour": "refuse" if rng.random() < declined else "comply"},
                facts={"expected": ("safe", "unsafe")[i % 2], "group": str(i // 2)},
            )
            for i in some(600)
        ],
        "mossbench": [
            Made(
                str(i),
                "I can't help with that." if (no := rng.random() < declined) else told,
                {"declines": no, "refusal": "full" if no else "none"},
                facts={"category": f"Type {i % 3}"},
            )
            for i in some(300)
        ],
        **{
            name: [
                Made(
                    str(i),
                    "A",
                    {"correct": bool(rng.random() < 0.6), "option": "A", "rule": "letter"},
                    facts={"category": f"Task {i % kinds}"},
                )
                for i in some(n)
            ]
            for name, n, kinds in (("mmstar", 1500, 6), ("mmt_mi", 3127, 160))
        },
    }
