"""The training loop: restore or initialise, step, log, save (state, data and timer together)."""

import json
import logging
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from mis_jax.config import RunConfig, changed_fields, load_config, save_config
from mis_jax.data.pipeline import BAD_SAMPLES, MIXTURE, SURVEY, StepData, TrainingData
from mis_jax.data.processor import Processor
from mis_jax.sharding import held_rows, make_mesh, put_batch
from mis_jax.storage import RunCheckpoints
from mis_jax.train.ahead import Ahead
from mis_jax.train.metrics import BOARD_FOLDER, LOG_FILES, MetricsLog
from mis_jax.train.program import make_program
from mis_jax.train.step import TrainState
from mis_jax.weights.checkpoint import Checkpoint, OpenCheckpoint, open_checkpoint
from mis_jax.weights.convert import write_checkpoint

_log = logging.getLogger(__name__)
_CONFIG, _CHECKPOINTS = "config.yaml", "checkpoints"
# Fields that a run may change when it goes on: they leave the samples and the mathematics alone.
_FREE = {
    "output", "data.on_bad_sample", "data.tile_cache", "data.workers", "train.micro_batch",
    "train.remat", "train.unroll", "train.save_every", "train.keep", "mesh.data", "mesh.fsdp",
    "mesh.tensor",
}  # fmt: skip
FINAL_MODEL = "final"  # the trained checkpoint in a run's folder, in native format
Progress = Callable[[int, int, dict[str, float]], None]  # step, steps in all, metrics
Looking = Callable[[int, int], None]  # samples whose size is known, samples in all


class FailedRun(RuntimeError):
    """A run that did not reach its end: a loss that is not finite, data that ran out."""


class Interrupted(FailedRun):
    """The run was asked to stop; everything up to `step` is saved."""

    def __init__(self, step: int):
        super().__init__(f"stopped at step {step}, saved; run the same command again to go on")
        self.step = step


@dataclass(frozen=True)
class Trained:
    """Outcome of a run."""

    model: Path
    steps: int
    seconds: float  # of training, over all sessions of the run


def train(
    config: RunConfig, progress: Progress | None = None, looking: Looking | None = None
) -> Trained:
    """Fine-tune as `config` says; goes on from the newest checkpoint in `config.output`.

    Raises ValueError for bad input, FailedRun for a loss that is not finite or a disk that is
    full, Interrupted on SIGTERM.
    """
    output = Path(config.output)
    _check_folder(config, output)
    opened = open_checkpoint(config.model)
    processor = Processor.from_folder(config.model, opened.config)
    data = TrainingData(config, processor, looking)
    mesh = make_mesh(config.mesh)
    _check_rows(config, mesh)
    fresh = not (output / _CONFIG).exists()
    output.mkdir(parents=True, exist_ok=True)
    save_config(config, output / _CONFIG)
    try:
        with jax.set_mesh(mesh):
            return _run(config, output, opened, data, mesh, progress)
    except ValueError:  # a bad sample, say: nothing half-written stays behind
        if fresh and not RunCheckpoints.exist(output / _CHECKPOINTS):
            _forget(output)
        raise


def _run(config, output, opened: OpenCheckpoint, data: TrainingData, mesh, progress) -> Trained:
    steps = data.steps
    program = make_program(config, opened.config, mesh, steps)
    state = program.load(opened)
    checkpoints = RunCheckpoints(output / _CHECKPOINTS, config.train.keep)
    ahead = None
    done, seconds = 0, 0.0

    def save(step: int, seconds: float) -> None:
        # The plan is fixed, so the number of batches taken is the whole state of the data.
        meta = {"seconds": seconds, "batches": step, "plan": data.fingerprint}
        checkpoints.save(step, _saved_part(state), meta)

    try:
        if (latest := checkpoints.latest) is not None:
            restored, meta = checkpoints.restore(latest, _saved_part(state, abstract=True))
            _check_plan(config, meta.get("plan"), data)
            state = TrainState(frozen=state.frozen, **restored)
            done, seconds = meta["batches"], meta["seconds"]
            _log.info("resumed at step %d", done)
        data.save(output)  # now that it is known to be the run's
        rows = held_rows(mesh, config.train.global_batch, config.train.micro_batch)
        ahead = Ahead(
            data.iterator(done, rows),
            lambda item: (item, put_batch(item.batch, mesh, accumulated=True)),
        )
        with MetricsLog(output, after_step=done) as log, _stop_signal() as stopped:
            began = time.monotonic() - seconds
            while done < steps and not stopped():
                tick = time.monotonic()  # waiting for data counts too
                item, batch = next(ahead)
                waited = time.monotonic() - tick
                state, metrics = program.step(state, batch)
                metrics = _plain_numbers(jax.device_get(metrics))
                metrics.pop("spike")
                if not metrics.pop("finite"):
                    raise _not_finite(output, item, done + 1, metrics)
                done += 1
                metrics |= {"samples": len(item.ids), "skipped": len(item.skipped)}
                metrics |= {"seconds": time.monotonic() - tick, "data_seconds": waited}
                log.write(done, metrics, item.ids, item.skipped)
                if progress:
                    progress(done, steps, metrics)
                if done % config.train.save_every == 0 and done < steps:
                    save(done, time.monotonic() - began)
            seconds = time.monotonic() - began
            if checkpoints.latest != done:
                save(done, seconds)
        if done < steps:
            raise Interrupted(done)
        final = output / FINAL_MODEL
        if not final.exists():
            for stale in output.glob(f".{FINAL_MODEL}.*"):  # of a kill while it was written
                shutil.rmtree(stale, ignore_errors=True)
            arrays = program.parameters(state)
            trained = Checkpoint(
                opened.config, arrays, config.dtype.params, config.model, opened.published
            )
            write_checkpoint(trained, final, "native")
    except OSError as error:
        raise FailedRun(
            f"step {done} of {steps}: {error}; the newest checkpoint is of step "
            f"{checkpoints.latest or 0}: make room or repair the disk, then run the same "
            "command again"
        ) from error
    finally:
        checkpoints.close()
        if ahead is not None:
            ahead.close()
    return Trained(final, done, seconds)


def _saved_part(state: TrainState, *, abstract: bool = False) -> dict[str, Any]:
    """What a checkpoint holds: frozen parameters are read from the starting model again."""
    tree = {
        "step": state.step,
        "trainable": state.trainable,
        "optimizer": state.optimizer,
        "usual_norm": state.usual_norm,
    }
    if not abstract:
        return tree
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _plain_numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Counts as whole numbers, the rest as floats: what JSON shows."""
    counts = ("tokens", "loss_tokens")
    return {n: int(v) if n in counts else float(v) for n, v in metrics.items()}


def _check_folder(config: RunConfig, output: Path) -> None:
    """A folder with checkpoints must belong to the same run; ValueError when it does not."""
    if not RunCheckpoints.exist(output / _CHECKPOINTS):
        return
    saved = output / _CONFIG
    if not saved.exists():
        raise ValueError(
            f"{saved}: missing beside checkpoints, so their settings are not known; restore it or "
            "choose another output"
        )
    changed = [name for name in changed_fields(load_config(saved), config) if name not in _FREE]
    if changed:
        raise ValueError(
            f"{saved}: this folder holds a run with other settings ({', '.join(changed)}); "
            "choose another output, or remove the folder"
        )


def _check_plan(config: RunConfig, before: str | None, data: TrainingData) -> None:
    """A run that goes on takes the next batch of the same plan, or it would repeat some samples."""
    if before != data.fingerprint:
        raise ValueError(
            f"{config.output}: the samples have changed since this run was saved, or the rows they "
            "share; restore the files of data.sources or choose another output"
        )


def _forget(output: Path) -> None:
    """Remove what a run that never got anywhere has written, and the folder if nothing is left."""
    for name in (_CONFIG, MIXTURE, SURVEY, BAD_SAMPLES, *LOG_FILES):
        (output / name).unlink(missing_ok=True)
    for name in (_CHECKPOINTS, BOARD_FOLDER):
        shutil.rmtree(output / name, ignore_errors=True)
    with suppress(OSError):  # not empty: the user's own files
        output.rmdir()


def _check_rows(config: RunConfig, mesh) -> None:
    rows = config.train.micro_batch or config.train.global_batch
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % shards:
        raise ValueError(
            f"{rows} rows of a forward pass cannot be split over data x fsdp = {shards} devices; "
            "change train.micro_batch, train.global_batch or mesh"
        )


def _not_finite(output: Path, item: StepData, step: int, metrics: dict[str, float]) -> FailedRun:
    path = output / "not_finite.json"
    values = {k: (v if math.isfinite(v) else str(v)) for k, v in metrics.items()}
    path.write_text(json.dumps({"step": step, "ids": item.ids, "metrics": values}, indent=2) + "\n")
    return FailedRun(
        f"step {step}: the loss or its gradient is not finite; parameters are unchanged since the "
        f"last checkpoint. The samples of the step are listed in {path}; lower the learning rate "
        "or take them out"
    )


@contextmanager
def _stop_signal() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM has come; the step under way is finished and saved first."""
    came: list[int] = []
    try:
        before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    except ValueError:  # not the main thread: the caller handles signals
        yield lambda: False
        return
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)
