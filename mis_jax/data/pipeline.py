"""The grain pipeline: rows -> examples -> micro-batches, shuffled, resumable."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import grain

from mis_jax.config import RunConfig
from mis_jax.data.chat import IMAGE_MARKER, count_images, from_sharegpt
from mis_jax.data.collate import Example
from mis_jax.data.processor import Processor
from mis_jax.data.sources import Row, read_sources
from mis_jax.model.batch import Batch

_log = logging.getLogger(__name__)
_WORKER_BUFFER = 16  # examples that each worker process reads ahead


@dataclass(frozen=True)
class StepData:
    """What one optimizer step takes: fields of `batch` have a leading axis of micro-batches."""

    batch: Batch
    ids: tuple[str, ...]
    skipped: int = 0  # bad samples that were passed over on the way to these


@dataclass(frozen=True)
class RenderRow:
    """Opens the images of a row, tiles them and renders the conversation."""

    processor: Processor
    max_tiles: int
    max_length: int

    def __call__(self, row: Row) -> Example:
        """Raises ValueError naming file, row and field of a sample that cannot be used."""
        try:
            messages = from_sharegpt(row.fields)
            _check_images(row, count_images(messages))
            example = self.processor.example(
                messages,
                row.images,
                id=row.id,
                max_tiles=self.max_tiles,
                add_generation_prompt=False,
            )
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from None
        if len(example.input_ids) > self.max_length:
            raise ValueError(
                f"{row.where}: {len(example.input_ids)} tokens, more than data.max_length "
                f"{self.max_length}; raise it, lower data.max_tiles, or set "
                "data.on_bad_sample: skip"
            )
        return example


@dataclass(frozen=True)
class _Rejected:
    """Stands in the stream in the place of a bad sample."""

    reason: str


@dataclass(frozen=True)
class _RenderOrReject:
    """What the readers run: a bad sample must not end a worker process that reads ahead."""

    render: RenderRow

    def __call__(self, row: Row) -> Example | _Rejected:
        try:
            return self.render(row)
        except ValueError as error:
            return _Rejected(str(error))


class _Steps(grain.DatasetIterator):
    """Examples of a stream -> one `StepData` a step; its state is that of the stream.

    Rows are batched here and not in the workers, so that a step holds the same samples however
    many workers read them.
    """

    def __init__(
        self, examples: grain.DatasetIterator, rows: int, processor: Processor, config: RunConfig
    ):
        super().__init__(examples)
        self._examples = examples
        self._rows = rows
        self._processor = processor
        self._config = config

    def __next__(self) -> StepData:
        wanted = self._config.train.global_batch
        chosen: list[Example] = []
        skipped = in_a_row = 0
        while len(chosen) < wanted:
            item = next(self._examples)
            if isinstance(item, Example):
                chosen.append(item)
                in_a_row = 0
                continue
            if self._config.data.on_bad_sample == "stop":
                raise ValueError(item.reason)
            _log.warning("skipped: %s", item.reason)
            skipped += 1
            in_a_row += 1
            if in_a_row >= 2 * self._rows:  # a good one, first in its epoch, then last, is nearer
                raise ValueError(f"all {self._rows} samples are bad; the last one: {item.reason}")
        return StepData(self._stacked(chosen), tuple(example.id for example in chosen), skipped)

    def _stacked(self, examples: Sequence[Example]) -> Batch:
        """Micro-batches of one shape out of a few."""
        train = self._config.train
        batch = self._processor.bucketed(
            examples, max_length=self._config.data.max_length, reduction=train.loss_reduction
        )
        micro_batches = train.global_batch // (train.micro_batch or train.global_batch)

        def stack(array: Any) -> Any:
            return array.reshape(micro_batches, -1, *array.shape[1:])

        return Batch(**{name: stack(getattr(batch, name)) for name in batch.__dataclass_fields__})

    def get_state(self) -> dict[str, Any]:
        return self._examples.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._examples.set_state(state)


class TrainingData:
    """The samples of a run and their order."""

    def __init__(self, config: RunConfig, processor: Processor):
        self.config = config
        self.rows = read_sources(config.data.sources, config.seed)
        self.render = RenderRow(processor, config.data.max_tiles, config.data.max_length)
        self.processor = processor
        if self.steps < 1:
            raise ValueError(
                f"{len(self.rows)} samples in {config.train.epochs} epoch(s) do not fill one batch "
                f"of train.global_batch {config.train.global_batch}; lower it"
            )

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        train = self.config.train
        if train.steps is not None:
            return train.steps
        assert train.epochs is not None
        return len(self.rows) * train.epochs // train.global_batch

    @property
    def fingerprint(self) -> str:
        """Of which samples there are and how they stand: their order depends on nothing else."""
        names = "\n".join(f"{len(row.id)} {row.id}" for row in self.rows)
        return hashlib.sha256(names.encode()).hexdigest()[:16]

    def iterator(self) -> "_Steps":
        """A grain iterator with `get_state`, `set_state` and `close`, without an end.

        The order is a function of the seed and the epoch alone. Where bad samples are skipped,
        those of the next epoch move up, so that a run has the steps it was planned with.
        """
        data = self.config.data
        mapped = grain.MapDataset.source(self.rows).seed(self.config.seed).shuffle()
        mapped = mapped.repeat().map(_RenderOrReject(self.render))
        examples = mapped.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=64))
        if data.workers:
            _let_workers_start()
            examples = examples.mp_prefetch(
                grain.MultiprocessingOptions(data.workers, per_worker_buffer_size=_WORKER_BUFFER)
            )
        return _Steps(iter(examples), len(self.rows), self.processor, self.config)


def _let_workers_start() -> None:
    """grain's workers refuse to start before absl's flags (absl comes with grain) are parsed."""
    flags = import_module("absl.flags").FLAGS
    if not flags.is_parsed():
        flags.mark_as_parsed()


def _check_images(row: Row, markers: int) -> None:
    """Images and markers must match, except that one image needs no marker."""
    given = len(row.images)
    if given == markers or (given == 1 and markers == 0):
        return
    if given == 0:
        raise ValueError(
            f"field 'image' is missing but 'conversations' has {markers} {IMAGE_MARKER}; "
            f"name the images or take the {IMAGE_MARKER} out"
        )
    raise ValueError(
        f"field 'image' names {given} image(s) but the human turns of 'conversations' have "
        f"{markers} {IMAGE_MARKER}; write one {IMAGE_MARKER} for each image"
    )
