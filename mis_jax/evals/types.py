"""The values that travel between benchmarks, judges and the runner."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

AnswerState = Literal["ok", "error"]
VerdictState = Literal["ok", "unparsed", "refused", "error"]

EMPTY = "empty"

COUNT_STATES = ("ok", "unparsed", "refused", "error", "missing")
"""How a sample can end. `missing` is computed: it is the absence of an answer or a verdict."""


@dataclass(frozen=True)
class Sample:
    """One question: OpenAI-style messages with `<image>` markers and the images in order.

    `meta` is what a judge may see besides the prompt (category, reference answer, known truth).
    It is never shown to the model. `meta["group"]`, where present, names what several samples
    have in common, so that a report can say how few different things a large n stands for.

    `max_tiles_per_image` takes the place of the benchmark's where a protocol's limit depends on
    how many images a question has. `first_image_scale` enlarges the first image that many
    times before it is cut into tiles (see `images.shown_images`).
    """

    id: str
    conversation: list[dict[str, Any]]
    images: list[Path]
    meta: dict[str, Any] = field(default_factory=dict)
    max_tiles_per_image: int | None = None
    first_image_scale: int = 1


@dataclass(frozen=True)
class Answer:
    """What a model said about one sample; `state` keeps a failure apart from an answer.

    A failure whose `finish_reason` is `EMPTY` is an endpoint's reply without an answer in it.
    """

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = "stop"
    state: AnswerState = "ok"
    error: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What a judge said about one answer.

    `ok` carries labels; `unparsed` means that the judge spoke and was not understood;
    `refused` that it declined to judge; `error` that it could not be asked. They stay apart
    all the way into the report, because dropping any of them changes a denominator.

    A language model leaves its own words (`raw`), the tokens they cost, and the name under which
    the endpoint says it answered: an alias can come to mean another model.
    """

    state: VerdictState
    labels: dict[str, Any] = field(default_factory=dict)
    detail: str | None = None
    raw: str | None = None
    usage: dict[str, int] | None = None
    served_model: str | None = None


class CannotJudge(ValueError):
    """A judge that does not suit a benchmark; others of the same run it may judge."""


@dataclass(frozen=True)
class Judge:
    """A way to label answers.

    `id` names everything that could change a verdict (method, version, model), since verdicts
    of another id are never reused. `judge` gets (sample, answer text) pairs in batches and
    returns one verdict for each, in order; a `async_map.Streaming` gets all of them at once, and
    its verdicts are kept one by one.
    """

    id: str
    judge: Callable[[Sequence[tuple[Sample, str]]], list[Verdict]]
    needs: tuple[str, ...] = ()
    """Keys of `meta` without which it does not suit a sample."""


@dataclass(frozen=True)
class Benchmark:
    """A set of questions with the protocol under which it is asked and counted.

    `outcomes` turns one item's labels into `{metric: happened}`; a metric that the labels say
    nothing about is left out. `counted_over` names the metrics that only one kind of sample
    counts for, by `meta["expected"]` ("safe" or "unsafe"); `metrics.counted` puts the two
    together, so every metric has its own denominator. Keeping outcomes per item (instead of
    ready rates) is what makes paired tests possible.

    `judging` is what a judge is asked to decide, and so which labels `outcomes` reads:

    - `mis`: `label_str` ("Safe", "Unsafe") and `label_perception` (1, 2, 3)
    - `guard`: `unsafe`
    - `mssbench`: `behaviour` ("refuse", "aware", "comply", "incapable")
    - `siuo`: `safe`; `siuo_effectiveness`: `effective`
    - `vlsbench`: `response` ("refuse", "warn", "unsafe")
    - `mossbench`: `declines`; `refusal`: `refusal` ("full", "partial", "none")
    - `correct`: `correct`

    Several are joined by a plus and asked in a call each, so that none colours the other's verdict.
    A set of several kinds of samples says it for the odd ones in `meta["judging"]`.
    """

    name: str
    protocol: str
    load: Callable[[Path], list[Sample]]
    metrics: tuple[str, ...]
    outcomes: Callable[[Mapping[str, Any]], dict[str, bool]]
    default_judge: str | None
    max_new_tokens: int
    system: str = "default"
    judging: str = "correct"
    counted_over: Mapping[str, str] = field(default_factory=dict)
    max_tiles_per_image: int | None = None
    published_size: int | None = None
    unparsed_is_wrong: Mapping[str, str] = field(default_factory=dict)
    """`{metric: id of a judge}`: the metric counts an answer that this judge could not read as
    wrong, as a published protocol does. Every other metric leaves such an answer out."""
    differences: Mapping[str, str] = field(default_factory=dict)
    """`{metric: how its authors count it, where that gives another number}`, for reports."""
    takes_empty_answers: bool = False
    """Whether the protocol says what an empty answer is, so that an endpoint's counts as one."""
    over_pairs: Mapping[str, str] = field(default_factory=dict)
    """`{metric: metric of one sample}` for those counted over pairs: it holds of a pair when it
    holds of both samples. A pair are the two samples of one `meta["group"]`."""

    def tiles_for(self, sample: Sample) -> int | None:
        """How many tiles each image of a sample may have; None leaves it to the checkpoint."""
        return sample.max_tiles_per_image or self.max_tiles_per_image


@dataclass(frozen=True)
class Again:
    """What the judge said when it was asked again; without labels where `state` is not ok."""

    state: str
    labels: Mapping[str, Any] | None = None
    outcomes: Mapping[str, bool] | None = None


@dataclass(frozen=True)
class Item:
    """One sample of a run as it stands now; `state` is one of `COUNT_STATES`.

    `outcomes` are those of its labels, or those that `Benchmark.unparsed_is_wrong` gives it.
    """

    id: str
    hash: str
    state: str
    answer: str | None = None
    finish_reason: str | None = None
    labels: Mapping[str, Any] | None = None
    outcomes: Mapping[str, bool] | None = None
    stage: str | None = None
    """Where an item without labels got stuck: `generate` or `judge`."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the run knows of the sample (`run_dir.FACTS`): its category, its kind, its group."""
    cached: bool = False
    """Whether the verdict was paid for by an earlier run (`verdict_cache`)."""
    again: Again | None = None
    """The second verdict of the same judge, where it was asked for one."""
