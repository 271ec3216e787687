"""The training loop: restore or initialise, step, log, save (state, data and timer together)."""

import logging
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from mis_jax import signals
from mis_jax.checkpoint.convert import write_checkpoint
from mis_jax.checkpoint.load import Checkpoint, OpenCheckpoint, open_checkpoint
from mis_jax.checkpoint.train_state import RunCheckpoints, set_aside_damaged
from mis_jax.config import RunConfig
from mis_jax.data.loader import StepData, TrainingData, without
from mis_jax.data.processor import Processor
from mis_jax.model.batch import Batch
from mis_jax.model.internvl import InternVL
from mis_jax.parallel import processes
from mis_jax.parallel.processes import CHECKPOINTS
from mis_jax.parallel.sharding import held_rows, make_mesh, put_batch
from mis_jax.storage.files import os_error_text
from mis_jax.storage.folders import remove_abandoned
from mis_jax.storage.locks import Lost
from mis_jax.train import lora
from mis_jax.train.compiled_step import make_train_program
from mis_jax.train.device_prefetch import DevicePrefetcher
from mis_jax.train.fingerprint import fingerprint
from mis_jax.train.host_agreement import (
    all_rejected,
    check_alike,
    failure_of,
    tell_failure,
    tell_rejected,
    unusable,
)
from mis_jax.train.metrics import MetricsLog, ThroughputMeter
from mis_jax.train.outcome import FailedRun, Interrupted, Resumable, SavedFailure, Trained
from mis_jax.train.profile import ProfileWindow
from mis_jax.train.run_folder import FINAL_MODEL, RunFolder, run_folder
from mis_jax.train.skipped_batches import save_skipped_batch
from mis_jax.train.step import TrainState

_log = logging.getLogger(__name__)
_CLOCK_STEPS = 10  # after so many, several processes ask the first one's clock
Progress = Callable[[int, int, dict[str, float]], None]  # step, steps in all, metrics
MeasureProgress = Callable[[int, int], None]  # samples whose size is known, samples in all
Evaluate = Callable[[InternVL, Processor], dict[str, float]]  # metrics on held-out samples


def train(
    config: RunConfig,
    progress: Progress | None = None,
    looking: MeasureProgress | None = None,
    evaluate: Evaluate | None = None,
) -> Trained:
    """Fine-tune as `config` says; goes on from the newest checkpoint in `config.output`.

    With several processes all of them call this; the first one writes what is written once.
    Raises ValueError for bad input, FailedRun for a loss that is not finite or a disk that is
    full, SavedFailure for a sample or an evaluation that ends it, Interrupted on SIGTERM, SIGINT
    and SIGHUP while steps are taken, Resumable when another process is lost. What fails before any
    step was taken leaves what was there before.
    """
    if config.train.keep_best and not config.evaluation.every:
        raise ValueError(
            "train.keep_best needs an attack success rate to compare; set evaluation.every"
        )
    with run_folder(config) as folder:
        return _train(config, folder, progress, looking, evaluate)


def _train(config: RunConfig, folder: RunFolder, progress, looking, evaluate) -> Trained:
    if config.evaluation.every and processes.several():
        raise ValueError(
            "evaluation.every: answers during training need all devices in one process; set it to "
            "0 and evaluate the checkpoints"
        )
    folder.check_shared()
    opened = open_checkpoint(config.model, check_digests=config.train.check_digests)
    assert opened.folder
    processor = Processor.from_folder(opened.folder, opened.config)
    data = TrainingData(config, processor, looking)
    folder.check_final(data.steps)
    check_alike(config, opened, data)
    mesh = make_mesh(config.mesh)
    _check_rows(config, mesh)
    try:
        with jax.set_mesh(mesh):
            processes.meet("checked")  # by all, before anything is written
            if processes.is_first():
                folder.begin()
                if config.train.check_digests:
                    set_aside_damaged(folder.path / CHECKPOINTS)
                _log.info("%s", _outline(data, mesh))
            processes.meet("begun")
            run = _Trainer(config, opened, data, mesh, folder, progress, evaluate)
            try:
                return run.train()
            finally:
                run.close()
    except BaseException as error:
        if isinstance(error, Exception) and processes.is_loss(error):
            raise Resumable(processes.lost(folder.path, error)) from error
        folder.take_back()  # after a bad first sample, say
        raise


def _outline(data: TrainingData, mesh: jax.sharding.Mesh) -> str:
    """What a run is about to do, in a line."""
    kinds = Counter(device.device_kind for device in mesh.devices.flat)
    devices = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    axes = " ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1)
    return (
        f"{devices}{f', mesh {axes}' if axes else ''}: {len(data.survey.good):,} samples, "
        f"{data.steps:,} steps of {data.config.train.global_batch:,} sequences; reading weights, "
        "then compiling the step"
    )


@dataclass(frozen=True)
class _DispatchedStep:
    """A step that was handed to the devices; its numbers are not known yet."""

    step: int
    item: StepData
    metrics: dict[str, jax.Array]
    waited: float  # for its data


class _Trainer:
    """One session of a run.

    The numbers of a step are fetched while the devices work on the next one, but before it is
    evaluated or saved: what is saved has been looked at.
    """

    def __init__(self, config, opened: OpenCheckpoint, data, mesh, folder, progress, evaluate):
        self.config, self.opened, self.mesh = config, opened, mesh
        self.data: TrainingData = data
        self.progress: Progress | None = progress
        self.evaluate: Evaluate | None = evaluate if config.evaluation.every else None
        self.profile = ProfileWindow(config.log, Path(config.output))
        self.meter = ThroughputMeter.of(config, opened.config, list(mesh.devices.flat))
        self.folder: RunFolder = folder
        self.output = folder.path
        self.program = make_train_program(config, opened.config, mesh, data.steps)
        self.checkpoints = RunCheckpoints(
            self.output / CHECKPOINTS, config.train.keep, keep_best=config.train.keep_best
        )
        self.done = 0  # steps that are behind us
        self.before = 0.0  # seconds of earlier sessions
        self.ahead: DevicePrefetcher | None = None
        self.asr: float | None = None  # of the state as it is, if it was evaluated
        self.lost = False
        self.failure: Exception | None = None  # of a sample or an evaluation: saved, then raised

    def train(self) -> Trained:
        """From the newest checkpoint, or the start, to the final model."""
        try:
            self.state = self._state()
            seconds, stopped = self._steps()
            if self.failure:
                raise SavedFailure(self.failure, self.done)
            if stopped or self.done < self.data.steps:
                signals.say(str(Interrupted(self.done)))
                raise Interrupted(self.done)
            final = self._final_model()
            self.checkpoints.finish()
            self.folder.check()
        except Exception as error:
            self.lost = processes.is_loss(error)
            if self.lost or not isinstance(error, OSError):
                raise
            if isinstance(error, Lost) or self.folder.lost():
                raise FailedRun(
                    f"step {self.done} of {self.data.steps}: {self.folder.lost() or error}; then "
                    "run the same command again"
                ) from error
            with suppress(OSError):  # what is being saved may be complete yet
                self.checkpoints.wait()
            raise FailedRun(
                f"step {self.done} of {self.data.steps}: {os_error_text(error)}; the newest "
                f"checkpoint is of step {self.checkpoints.latest or 0}: make room or repair the "
                "disk, then run the same command again"
            ) from error
        return Trained(final, self.done, seconds, self.config.final_dtype)

    def close(self) -> None:
        """End what reads ahead and what saves; a lost process would be waited for in vain."""
        self.profile.close()
        if self.ahead is not None:
            self.ahead.close()
        if not self.lost:
            self.checkpoints.close()

    def _state(self) -> TrainState:
        state = self.program.load(self.opened)
        loaded = state.frozen if self.config.lora.rank else state.frozen | state.trainable
        self.base = fingerprint(loaded)  # adapters are drawn, not read
        if (latest := self.checkpoints.latest) is None:
            return state
        restored, meta = self.checkpoints.restore(latest, _saved_part(state, abstract=True))
        _check_plan(self.config, meta.get("plan"), self.data)
        _check_base(self.config, meta.get("base"), self.base)
        self.done, self.before = meta["batches"], meta["seconds"]
        self.folder.keeps = True
        _log.info("resumed at step %d", self.done)
        grad_norm_ema = restored.pop("usual_norm")
        return TrainState(frozen=state.frozen, grad_norm_ema=grad_norm_ema, **restored)

    def _steps(self) -> tuple[float, bool]:
        """Take the steps that are left, until the end, a failure or a signal.

        Gives the seconds of training so far, and whether a signal came.
        """
        train = self.config.train
        if processes.is_first():
            self.data.save(self.output)  # now that it is known to be the run's
        rows = held_rows(self.mesh, train.global_batch, train.micro_batch)
        steps = self.data.iterator(self.done, rows)

        def place(batch: Batch) -> Batch:
            return put_batch(batch, self.mesh, accumulated=True)

        taken: _DispatchedStep | None = None
        several = processes.several()  # they can only stop after a step, together
        asked: Callable[[], bool] | None = None  # before the first step a signal ends all at once

        def stopped() -> bool:
            if asked is None:
                return False
            return processes.stop_agreed(self.done) if several else asked()

        with self._log() as log, ExitStack() as deferring:
            self.ahead = DevicePrefetcher(
                steps, lambda item: (item, place(item.batch)), lambda: not several and stopped()
            )

            self.finished_at = self.saved_at = time.monotonic()
            began = self.finished_at - self.before
            while self.done < self.data.steps and not self.failure and not stopped():
                tick = time.monotonic()
                try:
                    item, batch = next(self.ahead)
                except StopIteration:  # asked to stop while a sample did not come
                    break
                except Exception as error:
                    if not self.done or processes.is_loss(error):
                        raise
                    if not processes.several():
                        self.failure = error
                        break
                    tell_failure(self.done + 1, error)
                    item = steps.without_samples(self.done)
                    batch = place(unusable(item.batch))
                waited = time.monotonic() - tick
                if processes.several():
                    tell_rejected(self.done + 1, item.rejected)
                self.profile.before(self.done + 1)
                self.state, metrics = self.program.step(self.state, batch)
                self.profile.after(self.done + 1, metrics)
                if asked is None:  # it is compiled and under way
                    if several:
                        processes.listen_for_stop()
                    asked = deferring.enter_context(signals.deferred(several))
                if taken is not None:
                    self._finish_step(taken, log)
                    if self.failure:
                        taken = None  # as the one before, it left the state as it was
                        break
                self.checkpoints.check()
                self.folder.check()
                self.done += 1
                taken = _DispatchedStep(self.done, item, metrics, waited)
                saves = self._saves(self.done)
                if saves or self._evaluates(self.done):
                    self._finish_step(taken, log)
                    taken = None
                    if saves and self.done < self.data.steps and not self.failure:
                        self._save(time.monotonic() - began)
            if taken is not None:
                self._finish_step(taken, log)
            seconds = time.monotonic() - began
            self._wait()
            if self.done and self.checkpoints.latest != self.done:
                self._save(seconds)
                self._wait()
            return seconds, asked is not None and asked()

    def _evaluates(self, step: int) -> bool:
        return self.evaluate is not None and step % self.config.evaluation.every == 0

    def _saves(self, step: int) -> bool:
        """Whether a checkpoint is due after a step; all processes say the same."""
        train = self.config.train
        every = train.save_every or max(1, self.data.steps // 5)
        if step % every == 0 or (train.keep_best and self._evaluates(step)):
            return True
        if processes.several() and step % _CLOCK_STEPS:  # to agree costs a round
            return False
        return processes.first_says(time.monotonic() - self.saved_at > 60 * train.save_minutes)

    def _finish_step(self, taken: _DispatchedStep, log: MetricsLog | None) -> None:
        """Fetch the numbers of a step, look at them, evaluate what it made, and log all that."""
        metrics = _plain_numbers(jax.device_get(taken.metrics))
        self.folder.keeps = True
        item, rejected = taken.item, taken.item.rejected
        if processes.several() and self.config.data.on_bad_sample == "skip" and log:
            rejected = all_rejected(taken.step)
        ids = without(item.ids, set(rejected) - set(item.rejected))
        if processes.several() and not metrics["finite"]:
            self.failure = failure_of(taken.step)
            if self.failure:
                self.done = taken.step - 1
                return
        self._check_finite(taken, ids, metrics)
        metrics |= {"samples": len(ids), "skipped": len(rejected)}
        seconds = time.monotonic() - self.finished_at
        metrics |= {"seconds": seconds, "data_seconds": taken.waited}
        positions = self.config.train.global_batch * item.batch.input_ids.shape[-1]
        metrics |= self.meter.rates(metrics, len(ids), positions, seconds)
        metrics.pop("squares")
        self.asr = None
        if self.evaluate is not None and self._evaluates(taken.step):
            try:
                figures = self.evaluate(self.program.network(self.state), self.data.processor)
            except Exception as error:
                self.failure, figures = error, {}
            self.asr = figures.get("asr")
            metrics |= {f"eval_{name}": value for name, value in figures.items()}
        if log:
            log.write(taken.step, metrics, ids, [x.reason for x in rejected])
        if self.progress:
            self.progress(taken.step, self.data.steps, metrics)
        self.finished_at = time.monotonic()

    def _check_finite(
        self, taken: _DispatchedStep, ids: tuple[str, ...], metrics: dict[str, float]
    ) -> None:
        """Stop, or count a step that was left out; its batch is kept."""
        finite, spike = metrics.pop("finite"), metrics.pop("spike", False)
        if finite and not spike:
            return
        path = save_skipped_batch(self.output, taken.step, taken.item.batch, ids, metrics)
        what = (
            f"the gradient's norm {metrics['grad_norm']:.4g} is a spike"
            if finite
            else "the loss or its gradient is not finite"
        )
        if not finite and self.config.train.on_not_finite == "stop":
            raise FailedRun(
                f"step {taken.step}: {what}; parameters are unchanged since the last checkpoint. "
                f"The samples of the step are listed in {path}; lower the learning rate, take them "
                "out, or set train.on_not_finite: skip"
            )
        _log.warning("step %d: %s; it is left out (see %s)", taken.step, what, path)
        metrics["left_out"] = 1

    def _save(self, seconds: float) -> None:
        # The plan is fixed, so the number of batches taken is the whole state of the data.
        meta = {"seconds": seconds, "batches": self.done, "plan": self.data.fingerprint}
        meta["base"] = self.base
        self.checkpoints.save(self.done, _saved_part(self.state), meta, self.asr)
        self.saved_at = time.monotonic()

    def _wait(self) -> None:
        """Until what was saved is complete, on every process."""
        self.checkpoints.wait()
        processes.meet(f"saved {self.done}")

    def _log(self) -> AbstractContextManager[MetricsLog | None]:
        first = processes.is_first()
        if not first:
            return nullcontext()
        return MetricsLog(self.output, after_step=self.done, project=self.config.log.wandb)

    def _final_model(self) -> Path:
        final = self.output / FINAL_MODEL
        if not final.exists():
            if processes.is_first():  # of a kill while it was written
                remove_abandoned(final)
            if self.config.lora.rank:
                adapters = self.program.on_every_process(self.state.trainable)
                if processes.is_first():
                    lora.export(final, adapters, self.config, self.opened)
            else:
                trained = Checkpoint(
                    self.opened.config,
                    self.program.parameters(self.state),
                    self.config.dtype.params,
                    self.opened.folder,
                    self.opened.published,
                )
                write_checkpoint(trained, final, "native", dtype=self.config.final_dtype)
        processes.meet("final model")
        return final


def _saved_part(state: TrainState, *, abstract: bool = False) -> dict[str, Any]:
    """What a checkpoint holds: frozen parameters are read from the starting model again."""
    tree = {
        "step": state.step,
        "trainable": state.trainable,
        "optimizer": state.optimizer,
        "usual_norm": state.grad_norm_ema,  # its name in checkpoints since the first version
    }
    if not abstract:
        return tree
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _plain_numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Counts as whole numbers, the rest as floats: what JSON shows."""
    counts = ("tokens", "loss_tokens", "tiles")
    return {n: int(v) if n in counts else float(v) for n, v in metrics.items()}


def _check_plan(config: RunConfig, before: str | None, data: TrainingData) -> None:
    """A run that goes on takes the next batch of the same plan, or it would repeat some samples."""
    if before != data.fingerprint:
        raise ValueError(
            f"{config.output}: the samples have changed since this run was saved, or the rows they "
            "share; restore the files of data.sources or choose another output"
        )


def _check_base(config: RunConfig, before: str | None, now: str) -> None:
    """Frozen parameters are read again at every start: others would be mixed with the trained."""
    if before not in (None, now):  # a checkpoint of an earlier version has none
        raise ValueError(
            f"model {config.model}: its parameters are not those that this run began with "
            f"(fingerprint {now}, of the run {before}); restore them or choose another output"
        )


def _check_rows(config: RunConfig, mesh) -> None:
    rows = config.train.micro_batch or config.train.global_batch
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % shards:
        raise ValueError(
            f"{rows} rows of a forward pass cannot be split over data x fsdp = {shards} devices; "
            "change train.micro_batch, train.global_batch or mesh"
        )
