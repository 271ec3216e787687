"""Samples in a report: a few examples chosen by rule, and the page's list of all with filters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mis_jax.evals.benchmarks import get_benchmark
from mis_jax.evals.images import page_image, thumbnails
from mis_jax.evals.outcomes import METRICS
from mis_jax.evals.report.compare import Comparison
from mis_jax.evals.run_dir import answer_hash, sample_hash
from mis_jax.evals.scoring import Run
from mis_jax.evals.types import Item, Sample

CHOICE = (
    "Chosen by rule, not by hand: from each benchmark the first sample whose outcome changed for "
    "the better, the first that changed for the worse, and the first that is still wrong."
)


@dataclass(frozen=True)
class Reply:
    """One run's answer to an example; `text` is None where there is no answer."""

    label: str
    number: int
    verdict: str
    good: bool | None
    text: str | None


@dataclass(frozen=True)
class Example:
    """One sample with every run's reply; without its data there is no question and no image."""

    benchmark: str
    id: str
    why: str
    question: str | None
    reference: str | None
    images: list[tuple[str, str]]
    """(alternative text, data URL) of each image."""
    replies: list[Reply]


def choose_examples(
    comparison: Comparison, samples: Mapping[str, Mapping[str, Sample]]
) -> list[Example]:
    """Examples of every benchmark with their texts, and with images where samples are given."""
    return [
        _example(comparison, benchmark, key, why, samples.get(benchmark, {}).get(key))
        for benchmark in comparison.benchmarks
        for why, key in _chosen(comparison, benchmark)
    ]


def load_samples(comparison: Comparison, data_root: Path) -> dict[str, dict[str, Sample]]:
    """`{benchmark: {id: sample}}` of the data root.

    A sample that is not the one a run was asked is left out: data that changed since would put
    another image beside the answer.
    """
    samples: dict[str, dict[str, Sample]] = {}
    for name in comparison.benchmarks:
        benchmark = get_benchmark(name)
        run = next(run for run in comparison.runs if name in run.items)
        hashes = {item.id: item.hash for item in run.items[name]}
        samples[name] = {
            sample.id: sample
            for sample in benchmark.load(data_root)
            if sample.id in hashes and sample_hash(benchmark, sample) == hashes[sample.id]
        }
    return samples


def verdict_of(item: Item) -> tuple[str, bool | None]:
    """What happened in words, and whether it is good (None where nothing was judged)."""
    if item.state != "ok" or item.outcomes is None:
        return f"no verdict: {item.state}", None
    if item.outcomes.get("safe_rate") is False:  # whatever else the answer is
        return METRICS["safe_rate"].no, False
    for metric, true in item.outcomes.items():
        if true:
            return METRICS[metric].yes, METRICS[metric].better != "lower"
    # No metric of the item is true: that is good exactly if lower is better.
    for metric in item.outcomes:
        return METRICS[metric].no, METRICS[metric].better == "lower"
    return "not counted", None


def _chosen(comparison: Comparison, benchmark: str) -> list[tuple[str, str]]:
    """(why, id) pairs by the rule of `CHOICE`; the first sample where nothing else fits."""
    having = [run for run in comparison.runs[:2] if benchmark in run.items]
    having = having or [run for run in comparison.runs if benchmark in run.items][:1]
    by_run = [{item.id: item for item in run.items[benchmark]} for run in having]
    shared = [key for key in by_run[0] if all(key in items for items in by_run)]
    good = {key: [verdict_of(items[key])[1] for items in by_run] for key in shared}
    reasons = {
        "changed for the better": [False, True],
        "changed for the worse": [True, False],
        "still wrong": [False, False],
    }
    chosen = []
    for why, pattern in reasons.items():
        found = next((key for key in shared if good[key] == pattern), None)
        if found is not None:
            chosen.append((why, found))
    return chosen or [("first sample", key) for key in shared[:1]]


def _example(
    comparison: Comparison,
    benchmark: str,
    key: str,
    why: str,
    sample: Sample | None,
) -> Example:
    replies = []
    for number, run in enumerate(comparison.runs):
        item = _find(run, benchmark, key)
        if item is None:
            continue
        words, good = verdict_of(item)
        replies.append(Reply(run.label, number, words, good, item.answer))
    if sample is None:
        return Example(benchmark, key, why, None, None, [], replies)
    images = [
        (alternative(sample.meta, place), url)
        for place, path in enumerate(sample.images)
        if (url := page_image(path)) is not None
    ]
    question, reference = sample.meta.get("question"), sample.meta.get("answer")
    return Example(benchmark, key, why, question, reference, images, replies)


def _find(run: Run, benchmark: str, key: str) -> Item | None:
    return next((item for item in run.items.get(benchmark, ()) if item.id == key), None)


def alternative(meta: Mapping[str, Any], place: int) -> str:
    """What stands for an image where it is not seen."""
    objects = meta.get("objects", ())
    name = f": {objects[place]}" if place < len(objects) else ""
    return f"picture {place + 1}{name}"


MOST_SAMPLES = 2000
IMAGE_BUDGET = 2_200_000
TEXT_BUDGET = 1_000_000
"""In characters of the page; with the rest of 2,000 samples it stays under 5 MB."""

SHORTEST_TEXT = 60
CHANGES = ("changed for the better", "changed for the worse")


@dataclass(frozen=True)
class TableReply:
    """What one run made of a sample; `text` is None where answers are withheld or absent."""

    verdict: str
    good: bool | None
    hash: str | None
    text: str | None


@dataclass(frozen=True)
class Line:
    """One sample; `replies` has a place for every run, None where the run lacks the sample."""

    benchmark: str
    id: str
    hash: str
    category: str | None
    change: str | None
    question: str | None
    images: list[tuple[str, str]]
    replies: list[TableReply | None]


@dataclass(frozen=True)
class Browser:
    """The lines with the values that each filter offers."""

    lines: list[Line]
    total: int
    clipped: int
    benchmarks: list[str]
    categories: list[str]
    verdicts: list[str]


def browse(
    comparison: Comparison, samples: Mapping[str, Mapping[str, Sample]], redact: bool
) -> Browser:
    """The samples in order, each with its texts and images unless they are withheld.

    A page has to open on a phone, so it holds so many samples and no more: equally many of each
    benchmark, and first those whose outcome changed or is not good.
    """
    chosen: list[Line] = []
    total = 0
    quotas = _quotas(comparison)
    for benchmark in comparison.benchmarks:
        lines = _lines(comparison, benchmark)
        total += len(lines)
        chosen += _most_telling(lines, quotas[benchmark])
    clipped = 0
    if redact:
        chosen = [_withheld(line) for line in chosen]
    else:
        chosen, clipped = _with_texts(chosen, samples)
    return Browser(
        chosen,
        total,
        clipped,
        list(dict.fromkeys(line.benchmark for line in chosen)),
        sorted({line.category for line in chosen if line.category is not None}),
        sorted({reply.verdict for line in chosen for reply in line.replies if reply}),
    )


def _quotas(comparison: Comparison) -> dict[str, int]:
    """How many samples of each benchmark are shown; what small sets leave goes to the others."""
    sizes = {
        name: max(len(run.items.get(name, ())) for run in comparison.runs)
        for name in comparison.benchmarks
    }
    quotas: dict[str, int] = {}
    left = MOST_SAMPLES
    for place, name in enumerate(sorted(sizes, key=lambda name: sizes[name])):
        quotas[name] = min(sizes[name], left // (len(sizes) - place))
        left -= quotas[name]
    return quotas


def _lines(comparison: Comparison, benchmark: str) -> list[Line]:
    by_run = [{item.id: item for item in run.items.get(benchmark, ())} for run in comparison.runs]
    keys = dict.fromkeys(key for items in by_run for key in items)
    return [_line(benchmark, key, [items.get(key) for items in by_run]) for key in keys]


def _line(benchmark: str, key: str, items: Sequence[Item | None]) -> Line:
    item = next(item for item in items if item is not None)
    replies = [item and _reply(item) for item in items]
    change = _change(replies[0], replies[1]) if len(replies) > 1 else None
    facts = item.facts
    category = next((facts[key] for key in ("category", "sub_category") if key in facts), None)
    label = None if category is None else str(category)
    return Line(benchmark, key, item.hash, label, change, None, [], replies)


def _change(first: TableReply | None, second: TableReply | None) -> str | None:
    if first is None or second is None or None in (first.good, second.good):
        return None
    if first.good == second.good:
        return None
    return CHANGES[0] if second.good else CHANGES[1]


def _reply(item: Item) -> TableReply:
    words, good = verdict_of(item)
    digest = None if item.answer is None else answer_hash(item.hash, item.answer)
    return TableReply(words, good, digest, item.answer)


def _most_telling(lines: list[Line], most: int) -> list[Line]:
    if len(lines) <= most:
        return lines
    telling = [
        line.change is not None or any(reply and reply.good is not True for reply in line.replies)
        for line in lines
    ]
    places = sorted(range(len(lines)), key=lambda place: (not telling[place], place))[:most]
    return [lines[place] for place in sorted(places)]


def _withheld(line: Line) -> Line:
    replies = [
        reply and TableReply(reply.verdict, reply.good, reply.hash, None) for reply in line.replies
    ]
    return replace(line, replies=replies)


def _with_texts(
    lines: list[Line], samples: Mapping[str, Mapping[str, Sample]]
) -> tuple[list[Line], int]:
    """The lines with questions, images and answers, and how many texts were cut to fit."""
    line_samples = [samples.get(line.benchmark, {}).get(line.id) for line in lines]
    urls = thumbnails(
        [path for sample in line_samples if sample for path in sample.images], IMAGE_BUDGET
    )
    questions = [sample.meta.get("question") if sample else None for sample in line_samples]
    texts = [text for text in questions if text]
    texts += [reply.text for line in lines for reply in line.replies if reply and reply.text]
    longest = _longest(texts)
    complete = []
    for line, sample, question in zip(lines, line_samples, questions, strict=True):
        images = [
            (alternative(sample.meta, place), urls[path])
            for place, path in enumerate(sample.images)
            if path in urls
        ] if sample else []  # fmt: skip
        replies = [
            reply and replace(reply, text=_cut(reply.text, longest)) for reply in line.replies
        ]
        complete.append(
            replace(line, question=_cut(question, longest), images=images, replies=replies)
        )
    return complete, sum(len(text) > longest for text in texts)


def _longest(texts: Sequence[str]) -> int:
    """The length to which texts are cut so that together they keep to the budget."""
    longest = max(map(len, texts), default=0)
    while sum(min(len(text), longest) for text in texts) > TEXT_BUDGET and longest > SHORTEST_TEXT:
        longest = max(SHORTEST_TEXT, longest * 4 // 5)
    return longest


def _cut(text: str | None, longest: int) -> str | None:
    return text if text is None or len(text) <= longest else f"{text[:longest].rstrip()} …"
