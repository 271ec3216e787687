"""The samples of a run, batch by batch: planned before training, read ahead, resumed at any step.

Everything is a function of the settings and of the files: which samples a sequence holds, which
sequences a step takes, which shape its batch has. So a run goes on at any step on any number of
hosts and reading processes: each host takes its sequences of every step out of one schedule.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mis_jax.config import RunConfig
from mis_jax.data.collate import Example, length_bucket, loss_shares, loss_weight, tiles_bucket
from mis_jax.data.measure import Progress, save, survey
from mis_jax.data.mixture import Annotation, read_mixture
from mis_jax.data.packing import tiles_per_sequence
from mis_jax.data.preprocess import PreprocessSample, TileCache
from mis_jax.data.processor import Processor
from mis_jax.data.readers import in_order
from mis_jax.data.schedule import Capacity, Rounding, SampleSchedule, make_schedule
from mis_jax.data.upstream_policy import deviations
from mis_jax.model.batch import Batch
from mis_jax.storage.files import make_folder, replace_file

_log = logging.getLogger(__name__)
MIXTURE, SURVEY, BAD_SAMPLES = "mixture.json", "survey.npz", "bad_samples.jsonl"
_SEQUENCES_AHEAD = 16  # that each reading process holds ready
_TILES_AHEAD = 256  # at most, where sequences are packed: 150 MB of tiles of 448 pixels


@dataclass(frozen=True)
class Rejected:
    """Stands in a sequence in the place of a bad sample."""

    place: int  # in the schedule of the run
    id: str
    reason: str


@dataclass(frozen=True)
class StepData:
    """What one optimizer step takes: fields of `batch` have a leading axis of micro-batches."""

    batch: Batch  # the sequences that were asked for
    ids: tuple[str, ...]  # of all samples of the step, on every host; without those rejected here
    rejected: tuple[Rejected, ...] = ()  # bad samples that were left out of these sequences


def without(ids: tuple[str, ...], rejected: Iterable[Rejected]) -> tuple[str, ...]:
    """Ids of a step without its bad samples; an id may stand there several times."""
    kept = list(ids)
    for item in rejected:
        if item.id in kept:  # else it was left out before
            kept.remove(item.id)
    return tuple(kept)


@dataclass(frozen=True)
class _LoadSequence:
    """What the readers run: a bad sample must not end a process that reads ahead."""

    schedule: SampleSchedule
    annotations: Sequence[Annotation]
    render: PreprocessSample
    tokens: np.ndarray
    seed: int

    def __call__(self, number: int) -> list[Example | Rejected]:
        return [self._load(place, sample) for place, sample in self.schedule.sequence(number)]

    def _load(self, place: int, sample: int) -> Example | Rejected:
        annotation = self.annotations[sample]
        try:
            # The same tiles whoever renders them, and others in the next epoch.
            example = self.render(annotation, np.random.default_rng((self.seed, place)))
        except ValueError as error:
            return Rejected(place, annotation.id, str(error))
        if len(example.input_ids) != self.tokens[sample]:
            return Rejected(
                place,
                annotation.id,
                f"{annotation.where}: its images have changed since the run began; restore them, "
                "or choose another output",
            )
        return example


class TrainingData:
    """The samples of a run, looked at and put in order.

    Raises ValueError for annotation files that cannot be read and, unless bad samples are skipped,
    for every bad sample that can be told without decoding its images.
    """

    def __init__(self, config: RunConfig, processor: Processor, progress: Progress | None = None):
        self.config = config
        self.processor = processor
        data, train = config.data, config.train
        self.mixture = read_mixture(data.sources, config.seed)
        self.annotations = self.mixture.annotations
        self.render = make_preprocess(config, processor)
        self.survey = survey(
            self.annotations,
            self.render,
            saved=Path(config.output) / SURVEY,
            workers=data.workers,
            progress=progress,
        )
        _judge_problems(config, self.annotations, self.survey.problems)
        self.deviations = deviations(self.annotations) if data.rows == "upstream" else {}
        if self.deviations:
            told = ", ".join(f"{kind}: {count}" for kind, count in self.deviations.items())
            _log.warning("data.rows: upstream takes annotations that strict would not: %s", told)
        sizes = self.survey.tokens, self.survey.tiles
        good = self.survey.good
        self.capacity = None
        if data.packing:
            tokens, tiles_of = (size[good] for size in sizes)
            tiles = data.pack_tiles or tiles_per_sequence(tokens, tiles_of, data.max_length)
            if (largest := int(tiles_of.max())) > tiles:
                raise ValueError(
                    f"data.pack_tiles is {tiles}, but a sample has {largest} tiles; raise it or "
                    "lower data.max_tiles"
                )
            self.capacity = Capacity(data.max_length, tiles)
        self.schedule = make_schedule(
            good,
            *sizes,
            seed=config.seed,
            epochs=train.epochs,
            sequences=None if train.steps is None else train.steps * train.global_batch,
            capacity=self.capacity,
            rounding=(
                None
                if train.epoch_multiple is None
                else Rounding(train.epoch_multiple, train.global_batch)
            ),
        )

    @property
    def steps(self) -> int:
        """Optimizer steps of the run; the last one may have empty sequences."""
        return -(-self.schedule.sequences // self.config.train.global_batch)

    @cached_property
    def fingerprint(self) -> str:
        """Of which samples there are and of the sequences they share.

        A run that goes on must find it unchanged; a corrected answer is welcome.
        """
        names = "\n".join(
            f"{len(annotation.id)} {annotation.id}" for annotation in self.annotations
        )
        return f"{hashlib.sha256(names.encode()).hexdigest()[:16]}-{self.schedule.fingerprint}"

    def ids(self, step: int) -> tuple[str, ...]:
        """Ids of the samples of a step, sequence by sequence; steps count from 0."""
        return tuple(self.annotations[int(sample)].id for sample in self._samples(step))

    def shape(self, step: int) -> tuple[int, int]:
        """Tokens and tiles of a step's sequences: one of a few shapes, the same on every host."""
        if self.capacity is not None:
            return self.capacity.tokens, self.capacity.tiles
        samples = self._samples(step)
        tokens, tiles = (int(s[samples].max()) for s in (self.survey.tokens, self.survey.tiles))
        return length_bucket(tokens, self.config.data.max_length), tiles_bucket(tiles)

    def loss_shares(self, step: int) -> np.ndarray | None:
        """Of each sequence of a step, what its loss weights are multiplied by; None for 1.

        The sequences of a group may lie on several hosts, so their weights are those of the survey,
        which all of them have.
        """
        train = self.config.train
        if train.loss_group is None:
            return None
        first = step * train.global_batch
        sums = np.zeros(train.global_batch)
        for place in range(train.global_batch):
            for _, sample in self.schedule.sequence(first + place):
                count = int(self.survey.loss_tokens[sample])
                sums[place] += count * loss_weight(count, train.loss_reduction)
        return loss_shares(sums, train.loss_group)

    def _samples(self, step: int) -> np.ndarray:
        first = step * self.config.train.global_batch
        return self.schedule.samples[
            self.schedule.span(first, first + self.config.train.global_batch)
        ]

    def iterator(self, start: int = 0, sequences: ArrayLike | None = None) -> "Steps":
        """Steps `start` (from 0) to the last; of each the `sequences` that this process trains on.

        `sequences` are places in a step, equally many of every micro-batch, in order; all without
        it.
        """
        count = self.config.train.global_batch
        return Steps(self, start, np.arange(count) if sequences is None else np.asarray(sequences))

    def save(self, folder: Path) -> None:
        """Write what the run is made of into its folder: the mixture, sizes, bad samples."""
        content: dict[str, Any] = {"samples": len(self.annotations)}
        if self.config.data.rows == "upstream":
            content["deviations"] = self.deviations
        content["sources"] = self.mixture.sources
        replace_file(folder / MIXTURE, json.dumps(content, indent=1, default=str) + "\n")
        save(self.survey, folder / SURVEY)
        if problems := self.survey.problems:
            _write_problems(folder / BAD_SAMPLES, self.annotations, problems)
            _log.warning(
                "%d of %d samples are bad and left out, listed in %s; the first one: %s",
                len(problems), len(self.annotations), folder / BAD_SAMPLES, problems[min(problems)],
            )  # fmt: skip


class Steps:
    """Iterator of `StepData`; `close` ends the processes that read ahead."""

    def __init__(self, data: TrainingData, start: int, sequences: np.ndarray):
        self._data, self._step, self._sequences = data, start, sequences
        count = data.config.train.global_batch
        steps = np.arange(start, data.steps)
        numbers = (steps[:, None] * count + sequences[None]).reshape(-1)
        load = _LoadSequence(
            data.schedule, data.annotations, data.render, data.survey.tokens, data.config.seed
        )
        ahead = _SEQUENCES_AHEAD
        if data.capacity is not None:
            ahead = max(1, min(ahead, _TILES_AHEAD // max(1, data.capacity.tiles)))
        self._loaded = in_order(load, numbers, data.config.data.workers, ahead=ahead)

    def __iter__(self) -> "Steps":
        return self

    def __next__(self) -> StepData:
        if self._step >= self._data.steps:
            raise StopIteration
        packed: list[list[Example]] = []
        bad: list[Rejected] = []
        for _ in self._sequences:
            found = next(self._loaded)
            packed.append([item for item in found if isinstance(item, Example)])
            bad += [item for item in found if isinstance(item, Rejected)]
        if bad and self._data.config.data.on_bad_sample == "stop":
            raise ValueError(bad[0].reason)
        for item in bad:
            _log.warning("skipped: %s", item.reason)
        ids = without(self._data.ids(self._step), bad)
        step = StepData(self._stacked(packed, self._step), ids, tuple(bad))
        self._step += 1
        return step

    def without_samples(self, step: int) -> StepData:
        """A step (from 0) whose sequences are empty, in the shapes that it has on every process."""
        return StepData(self._stacked([[] for _ in self._sequences], step), self._data.ids(step))

    def _stacked(self, packed: list[list[Example]], step: int) -> Batch:
        """Micro-batches of the shape of the step."""
        train = self._data.config.train
        length, tiles = self._data.shape(step)
        shares = self._data.loss_shares(step)
        batch = self._data.processor.collate(
            packed,
            length=length,
            tiles_per_sequence=tiles,
            reduction=train.loss_reduction,
            shares=None if shares is None else shares[self._sequences],
        )
        micro_batches = train.global_batch // (train.micro_batch or train.global_batch)

        def stack(array: Any) -> Any:
            return array.reshape(micro_batches, -1, *array.shape[1:])

        return Batch(**{name: stack(getattr(batch, name)) for name in batch.__dataclass_fields__})

    def close(self) -> None:
        """Stop reading ahead."""
        self._loaded.close()


def make_preprocess(config: RunConfig, processor: Processor) -> PreprocessSample:
    """How a run renders its samples."""
    data = config.data
    return PreprocessSample(
        processor,
        data.max_tiles,
        data.max_length,
        truncate=data.too_long == "truncate",
        cache=None if data.tile_cache is None else TileCache(data.tile_cache),
        rows=data.rows,
    )


def _judge_problems(
    config: RunConfig, annotations: Sequence[Annotation], problems: dict[int, str]
) -> None:
    """Stop at bad samples, unless they are left out and others remain."""
    if not problems:
        return
    first = problems[min(problems)]
    if config.data.on_bad_sample == "skip":
        if len(problems) < len(annotations):
            return  # `TrainingData.save` lists them
        raise ValueError(f"all {len(annotations)} samples are bad; the first one: {first}")
    if len(problems) == 1:
        raise ValueError(first)
    output = Path(config.output)
    report = output.with_name(f"{output.name}.{BAD_SAMPLES}")
    make_folder(report.parent)
    _write_problems(report, annotations, problems)
    raise ValueError(f"{first} (the first of {len(problems)} bad samples, listed in {report})")


def _write_problems(
    path: Path, annotations: Sequence[Annotation], problems: dict[int, str]
) -> None:
    lines = [
        json.dumps(
            {
                "id": annotations[number].id,
                "where": annotations[number].where,
                "reason": problems[number],
            }
        )
        for number in sorted(problems)
    ]
    replace_file(path, "\n".join(lines) + "\n")
