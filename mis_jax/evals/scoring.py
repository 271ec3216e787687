"""Stage 3: count the verdicts of a run into `RUN/results.json`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mis_jax.evals.benchmarks import check_known, get_benchmark
from mis_jax.evals.outcomes import counted, verdict_outcomes
from mis_jax.evals.run_dir import (
    answer_hash,
    expected,
    known_facts,
    manifest_path,
    read_manifest,
)
from mis_jax.evals.stats import kappa, rate
from mis_jax.evals.types import COUNT_STATES, EMPTY, Again, Benchmark, Item
from mis_jax.storage.json_files import replace_json
from mis_jax.storage.jsonl import read_log


def read_items(run_dir: Path, name: str, judge: str | None) -> list[Item]:
    """Join what was expected, answered and judged; the last row of an id and hash wins."""
    hashes = expected(run_dir, name)
    answers: dict[str, dict[str, Any]] = {}
    for answer in read_log(run_dir / name / "samples.jsonl"):
        if hashes.get(answer["id"]) == answer["hash"]:
            answers[answer["id"]] = answer
    verdicts = _verdicts(run_dir / name / "verdicts.jsonl", judge)
    rechecks = _verdicts(run_dir / name / "rechecks.jsonl", judge)
    facts = known_facts(run_dir, name)
    benchmark = get_benchmark(name)
    return [
        _counted(
            benchmark,
            _item(key, hashes[key], answers.get(key), verdicts, rechecks),
            facts.get(key, {}),
            judge,
        )
        for key in hashes
    ]


_Verdicts = Mapping[tuple[str, str], dict[str, Any]]


def _verdicts(path: Path, judge: str | None) -> _Verdicts:
    return {
        (verdict["id"], verdict["answer_hash"]): verdict
        for verdict in read_log(path)
        if verdict["judge"] == judge
    }


def _counted(benchmark: Benchmark, item: Item, facts: Mapping[str, Any], judge: str | None) -> Item:
    outcomes = verdict_outcomes(benchmark, judge, item.state, item.labels, facts)
    again = item.again
    if again and again.labels is not None:
        again = replace(again, outcomes=counted(benchmark, again.labels, facts))
    return replace(item, facts=facts, outcomes=outcomes, again=again)


def _item(
    key: str,
    content: str,
    answer: dict[str, Any] | None,
    verdicts: _Verdicts,
    rechecks: _Verdicts,
) -> Item:
    if answer is None:
        return Item(key, content, "missing", stage="generate")
    text, reason = answer["answer"], answer["finish_reason"]
    if answer["state"] != "ok":
        return Item(key, content, "error", finish_reason=reason, stage="generate")
    place = (key, answer_hash(content, text))
    verdict, second = verdicts.get(place), rechecks.get(place)
    if verdict is None:
        return Item(key, content, "missing", text, reason, stage="judge")
    if verdict["state"] != "ok":
        return Item(key, content, verdict["state"], text, reason, stage="judge")
    again = None
    if second and second["reference"] == verdict["reference"]:
        again = Again(second["state"], second["labels"] if second["state"] == "ok" else None)
    cached = verdict.get("cached", False)
    return Item(key, content, "ok", text, reason, verdict["labels"], cached=cached, again=again)


def metric_votes(items: list[Item], metric: str) -> dict[str, bool]:
    """Whether the metric happened, for each judged item to which it applies."""
    return {
        item.id: item.outcomes[metric]
        for item in items
        if item.outcomes is not None and metric in item.outcomes
    }


def pairs_of(items: list[Item]) -> dict[str, list[Item]]:
    """The complete pairs by their group: a sample whose counterpart is not in the run has none."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        if "group" in item.facts:
            groups.setdefault(str(item.facts["group"]), []).append(item)
    return {name: both for name, both in groups.items() if len(both) == 2}


def pair_rate(items: list[Item], metric: str) -> dict[str, Any] | None:
    """How many judged pairs have the metric twice; None where the run knows of no pair."""
    votes = metric_votes(items, metric)
    pairs = pairs_of(items)
    judged = [both for both in pairs.values() if all(item.id in votes for item in both)]
    hits = sum(all(votes[item.id] for item in both) for both in judged)
    return rate(hits, len(judged)) if pairs else None


def count_items(name: str, protocol: str, items: list[Item]) -> dict[str, Any]:
    """One benchmark's entry of `results.json`; `empty`, `cached`, `recheck` where there is any."""
    counts = {state: sum(item.state == state for item in items) for state in COUNT_STATES}
    benchmark = get_benchmark(name)
    metrics = {}
    for metric in benchmark.metrics:
        votes = list(metric_votes(items, metric).values())
        metrics[metric] = rate(sum(votes), len(votes))
    for metric, single in benchmark.over_pairs.items():
        if (counted_pairs := pair_rate(items, single)) is not None:
            metrics[metric] = counted_pairs
    cached = sum(item.cached for item in items)
    empty = sum(is_empty(item) for item in items)
    entry = {"protocol": protocol, "n": len(items), "counts": counts, "metrics": metrics}
    extra = {"empty": empty, "cached": cached, "recheck": self_agreement(items, benchmark.metrics)}
    return entry | {key: value for key, value in extra.items() if value}


def is_empty(item: Item) -> bool:
    """Whether the model was heard and said nothing: an answer, or an endpoint's error."""
    if item.answer is None:
        return item.finish_reason == EMPTY
    return not item.answer.strip()


def run_items(run_dir: Path) -> dict[str, list[Item]]:
    """The items of every benchmark of a run, by benchmark."""
    entries = read_manifest(run_dir)["benchmarks"]
    check_known(entries, manifest_path(run_dir))
    return {name: read_items(run_dir, name, entry.get("judge")) for name, entry in entries.items()}


def compute_results(run_dir: Path) -> dict[str, Any]:
    """What `results.json` should say now, without writing it."""
    entries = read_manifest(run_dir)["benchmarks"]
    return {name: _entry(name, entries[name], items) for name, items in run_items(run_dir).items()}


def _entry(name: str, asked: Mapping[str, Any], items: list[Item]) -> dict[str, Any]:
    """The entry of `results.json`; `of` is the size of the set where a part of it was asked."""
    whole = (asked.get("part") or {}).get("of")
    part = {"of": whole} if whole is not None and whole != len(items) else {}
    return count_items(name, asked["protocol"], items) | part


def summarise(run_dir: Path) -> dict[str, Any]:
    """Count the verdicts, write `RUN/results.json` and return what it holds."""
    results = compute_results(run_dir)
    replace_json(run_dir / "results.json", results)
    return results


def without_verdict(results: Mapping[str, Any]) -> int:
    """How many samples ended without labels; `judge` and `eval` exit 1 unless it is zero."""
    return sum(entry["n"] - entry["counts"]["ok"] for entry in results.values())


def verdict_notes(entry: Mapping[str, Any]) -> list[str]:
    """What a benchmark's entry says of its verdicts besides the counts, in words."""
    notes = []
    if empty := entry.get("empty"):
        notes.append(f"{empty} of {entry['n']} answers are empty")
    if cached := entry.get("cached"):
        notes.append(f"{cached} verdicts were paid for by earlier runs")
    if recheck := entry.get("recheck"):
        same, lost = recheck["labels"], recheck["n"] - recheck["labels"]["n"]
        without = f", {lost} without labels the second time" if lost else ""
        notes.append(
            f"judged twice: {recheck['n']}; the same labels {same['k']}/{same['n']}{without}"
        )
    return notes


def self_agreement(items: Sequence[Item], metrics: Sequence[str]) -> dict[str, Any] | None:
    """First and second verdicts compared, for `results.json`; None where nothing was rechecked.

    `counts` are the states of the second verdicts; only labels can be compared. `labels` is
    the rate at which all labels are the same. Under each metric stand the rate at which the two
    verdicts count alike, the two-by-two table, and Cohen's kappa with its interval.
    """
    again = [item.again for item in items if item.again is not None]
    if not again:
        return None
    states = {
        state: sum(one.state == state for one in again)
        for state in ("ok", "unparsed", "refused", "error")
    }
    both = [(item, item.again) for item in items if item.again and item.again.labels is not None]
    same = sum(item.labels == second.labels for item, second in both)
    return {
        "n": len(again),
        "counts": states,
        "labels": rate(same, len(both)),
        "metrics": {
            metric: _of_votes(
                [
                    (item.outcomes[metric], second.outcomes[metric])
                    for item, second in both
                    if item.outcomes and second.outcomes
                    if metric in item.outcomes and metric in second.outcomes
                ]
            )
            for metric in metrics
        },
    }


def _of_votes(votes: Sequence[tuple[bool, bool]]) -> dict[str, Any]:
    cells = {
        "both": votes.count((True, True)),
        "only_first": votes.count((True, False)),
        "only_second": votes.count((False, True)),
        "neither": votes.count((False, False)),
    }
    beside = asdict(kappa(**cells))
    agreed = rate(cells["both"] + cells["neither"], len(votes))
    return {"agreed": agreed, **cells, "kappa": {k: beside[v] for k, v in _KAPPA.items()}}


_KAPPA = {"value": "kappa", "low": "low", "high": "high"}


@dataclass(frozen=True)
class Run:
    """One evaluation run under the label a reader knows it by."""

    label: str
    manifest: dict[str, Any]
    items: dict[str, list[Item]]
    results: dict[str, Any]

    def judge(self, benchmark: str) -> str | None:
        """The id of the judge whose verdicts count."""
        return self.manifest["benchmarks"][benchmark].get("judge")


def read_run(label: str, run_dir: Path) -> Run:
    """A run as its logs stand now, so that a report never shows counts of an earlier day."""
    manifest = read_manifest(run_dir)
    items = run_items(run_dir)
    results = {
        name: _entry(name, manifest["benchmarks"][name], samples) for name, samples in items.items()
    }
    return Run(label, manifest, items, results)


def groups_of(items: list[Item]) -> dict[str, str]:
    """`{sample id: group}` of the samples that belong to one."""
    return {item.id: str(item.facts["group"]) for item in items if "group" in item.facts}
