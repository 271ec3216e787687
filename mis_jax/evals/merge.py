"""One run out of several: the shards of a benchmark, or different benchmarks of one model."""

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from mis_jax.evals.benchmarks import check_known
from mis_jax.evals.run_dir import (
    conditions_of,
    expected,
    known_facts,
    manifest_path,
    read_manifest,
    same_conditions,
)
from mis_jax.evals.scoring import summarise
from mis_jax.storage.json_files import replace_json
from mis_jax.storage.jsonl import AppendLog, read_log
from mis_jax.storage.locks import LOCK
from mis_jax.storage.paths import destination_path

LOGS = ("samples.jsonl", "verdicts.jsonl", "rechecks.jsonl")


def merge_runs(runs: Sequence[Path], out: Path) -> dict[str, Any]:
    """Copy runs of one model into the new run `out`; returns its results.

    Answers and verdicts keep all their rows. ValueError for runs of different models, protocols or
    judges, for samples that two runs share, and for shards that are not all there.
    """
    out = destination_path(out, "OUT")
    if out.exists() and any(path.name != LOCK for path in out.iterdir()):
        raise ValueError(f"{out} is not empty; name a new folder for the merged run")
    manifests = [read_manifest(run) for run in runs]
    first = manifests[0]
    for run, manifest in zip(runs, manifests, strict=True):
        if manifest["model"]["fingerprint"] != first["model"]["fingerprint"]:
            raise ValueError(
                f"{run} is of model {manifest['model']['name']!r}, {runs[0]} of "
                f"{first['model']['name']!r}, or of other weights; merge runs of one model"
            )
        check_known(manifest["benchmarks"], manifest_path(run))
        same_conditions(conditions_of(first), conditions_of(manifest), str(runs[0]), str(run))
    names = dict.fromkeys(name for manifest in manifests for name in manifest["benchmarks"])
    entries, owed = {}, {}
    for name in names:
        having = [
            (run, manifest["benchmarks"][name])
            for run, manifest in zip(runs, manifests, strict=True)
            if name in manifest["benchmarks"]
        ]
        entries[name] = _entry(name, having)
        owed[name] = _expected(name, having)
        entries[name]["n"] = len(owed[name])
    for name in names:
        replace_json(out / name / "expected.json", owed[name])
        facts = {key: known for run in runs for key, known in known_facts(run, name).items()}
        replace_json(out / name / "facts.json", facts)
        for file in LOGS:
            lines = [entry for run in runs for entry in read_log(run / name / file)]
            if lines:
                with AppendLog(out / name / file) as log:
                    log.append(lines)
    origin = {"resumed": _other_sessions(manifests), "merged": [str(run) for run in runs]}
    replace_json(manifest_path(out), first | {"benchmarks": entries} | origin)
    return summarise(out)


def _other_sessions(manifests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sessions under other versions than the first one's, each of these once."""
    versions, others = [manifests[0]["versions"]], []
    for manifest in manifests:
        for session in (manifest, *manifest.get("resumed", ())):
            if session["versions"] not in versions:
                versions.append(session["versions"])
                others.append({"date": session["date"], "versions": session["versions"]})
    return others


def _entry(name: str, having: list[tuple[Path, dict[str, Any]]]) -> dict[str, Any]:
    """The manifest's entry of one benchmark, after a look at what must be alike."""
    (where, entry), *others = having
    for run, other in others:
        for field in ("protocol", "system", "max_new_tokens", "max_tiles_per_image", "judge"):
            if other.get(field) != entry.get(field):
                remedy = (
                    "judge them alike, or merge before judging"
                    if field == "judge"
                    else "evaluate them alike"
                )
                raise ValueError(
                    f"{name}: {field} is {entry.get(field)!r} in {where} and "
                    f"{other.get(field)!r} in {run}; {remedy}"
                )
    parts = [entry.get("part") or {"limit": None, "shard": 1, "shards": 1} for _, entry in having]
    kinds = {(part["limit"], part["shards"], part.get("of")) for part in parts}
    if len(kinds) > 1:
        raise ValueError(f"{name}: the runs are shards of different divisions; see their manifests")
    ((limit, shards, of),) = kinds
    present = [part["shard"] for part in parts]
    if missing := set(range(1, shards + 1)) - set(present):
        shown = ", ".join(f"{shard}/{shards}" for shard in sorted(missing))
        raise ValueError(f"{name}: shard {shown} is missing; name its run too")
    if len(present) > shards:
        twice = ", ".join(str(run) for run, _ in having)
        raise ValueError(f"{name}: a part occurs twice in {twice}; leave one of them out")
    whole = {"limit": limit, "shard": 1, "shards": 1, "of": of} if limit else None
    # Shards may share what samples have in common, so the most of any is what is sure.
    groups = max((e["groups"] for _, e in having if e["groups"] < e["n"]), default=None)
    return entry | {"part": whole, "groups": groups}


def _expected(name: str, having: list[tuple[Path, dict[str, Any]]]) -> dict[str, str]:
    """The samples of all shards in the order of the whole set."""
    in_order = sorted(having, key=lambda pair: (pair[1].get("part") or {"shard": 1})["shard"])
    shards = [list(expected(run, name).items()) for run, _ in in_order]
    hashes: dict[str, str] = {}
    for samples in zip_longest(*shards):
        for sample, content in filter(None, samples):
            if sample in hashes:
                raise ValueError(f"{name}: sample {sample} is in two of the runs")
            hashes[sample] = content
    return hashes
