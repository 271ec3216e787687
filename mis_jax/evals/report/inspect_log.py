"""A run as logs in the shape of Inspect's evaluation log, one for each benchmark.

For tools that read such logs. The field names are Inspect's (version 2 of its format), as far as
a run here has something to put into them; events and model calls are left out. A sample without
a verdict has no score, and its state stands in its metadata.
"""

from pathlib import Path
from typing import Any

from mis_jax.evals.scoring import Run, read_run
from mis_jax.evals.types import Item
from mis_jax.storage.hashing import digest
from mis_jax.storage.json_files import replace_json

FORMAT_VERSION = 2
WITHHELD = "withheld"
_STOPS = {"stop": "stop", "length": "max_tokens"}


def write_inspect_logs(run_dir: Path, out: Path, *, redact: bool = True) -> list[Path]:
    """Write `out/<benchmark>.json` for every benchmark of a run and return the paths.

    The input of a sample is its content hash, since a run does not hold its questions. With
    `redact` the answers and the judge's labels are withheld too; what they count for stays.
    """
    run = read_run(run_dir.name, run_dir)
    paths = []
    for benchmark in run.results:
        path = out / f"{benchmark}.json"
        replace_json(path, inspect_log(run, benchmark, redact=redact))
        paths.append(path)
    return paths


def inspect_log(run: Run, benchmark: str, *, redact: bool = True) -> dict[str, Any]:
    """The log of one benchmark."""
    entry, manifest = run.results[benchmark], run.manifest
    settings = manifest["benchmarks"][benchmark]
    judge = run.judge(benchmark) or "none"
    model = manifest["model"]["name"]
    items = run.items[benchmark]
    created = manifest.get("date")
    return {
        "version": FORMAT_VERSION,
        "status": "success" if entry["counts"]["ok"] == entry["n"] else "error",
        "eval": {
            "run_id": digest([model, manifest["model"].get("fingerprint"), created])[:22],
            "created": created,
            "task": benchmark,
            "task_id": entry["protocol"],
            "task_version": 1,
            "dataset": {
                "name": benchmark,
                "samples": entry["n"],
                "sample_ids": [item.id for item in items],
            },
            "model": model,
            "config": {"epochs": 1},
            "packages": manifest.get("versions", {}),
            "metadata": {
                "protocol": entry["protocol"],
                "judge": judge,
                "fingerprint": manifest["model"].get("fingerprint"),
                "counts": entry["counts"],
            },
        },
        "plan": {
            "name": "plan",
            "steps": [{"solver": "generate", "params": {"system": settings.get("system")}}],
            "config": {"max_tokens": settings.get("max_new_tokens"), "temperature": 0.0},
        },
        "results": {
            "total_samples": entry["n"],
            "completed_samples": entry["counts"]["ok"],
            "scores": [
                _score(name, judge, rate, entry["n"]) for name, rate in entry["metrics"].items()
            ],
        },
        "samples": [_sample(item, model, judge, redact) for item in items],
    }


def _score(name: str, judge: str, rate: dict[str, Any], total: int) -> dict[str, Any]:
    metrics = {
        key: {"name": key, "value": rate[key], "params": {}}
        for key in ("value", "low", "high", "k", "n")
        if rate[key] is not None
    }
    counted = {"scored_samples": rate["n"], "unscored_samples": total - rate["n"]}
    return {"name": name, "scorer": judge, **counted, "params": {}, "metrics": metrics}


def _sample(item: Item, model: str, judge: str, redact: bool) -> dict[str, Any]:
    answer = WITHHELD if redact and item.answer is not None else item.answer
    choices = []
    if answer is not None:
        choices.append(
            {
                "message": {"role": "assistant", "content": answer, "source": "generate"},
                "stop_reason": _STOPS.get(item.finish_reason or "", "unknown"),
            }
        )
    scores = {}
    if item.outcomes is not None:
        value = {name: int(happened) for name, happened in item.outcomes.items()}
        # A judge may quote the answer.
        labels = {} if redact or item.labels is None else {"labels": dict(item.labels)}
        scores[judge] = {"value": value, "metadata": labels}
    return {
        "id": item.id,
        "epoch": 1,
        "input": f"sha256:{item.hash}",
        "target": "",
        "messages": [],
        "output": {"model": model, "choices": choices},
        "scores": scores,
        "metadata": {"state": item.state, "stage": item.stage, **item.facts},
    }
