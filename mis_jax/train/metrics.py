"""A run's numbers: its rates, and one writer of its logs, of TensorBoard and of W&B."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from tensorboardX import event_file_writer
from tensorboardX.proto import event_pb2, summary_pb2

from mis_jax import flops
from mis_jax.config import RunConfig
from mis_jax.model.config import InternVLConfig
from mis_jax.storage.files import make_folder, read_text, replace_file
from mis_jax.storage.jsonl import AppendLog, Entry

LOG_FILES = ("metrics.jsonl", "samples.jsonl")
BOARD_FOLDER = "tensorboard"
SITE_RUN = "wandb_run"  # holds the name of the run there


class MetricsLog:
    """Appends a line a step; entries after the step that a run resumes at are dropped first.

    Raises OSError when the disk does not take a line.
    """

    def __init__(self, folder: Path, *, after_step: int, project: str | None = None):
        def earlier(line: Entry) -> bool:
            step = line.get("step")
            return isinstance(step, int) and step <= after_step

        self._site = None if project is None else _Site(folder, project)
        self._logs = {
            name: AppendLog(folder / name, durable=False, damaged="skip", keep=earlier).begin()
            for name in LOG_FILES
        }
        self._board = _Board(folder / BOARD_FOLDER, after_step)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if self._site:
            self._site.close(failed=failure is not None)
        for file in (*self._logs.values(), self._board):
            try:
                file.close()
            except OSError:  # what can no longer be flushed must not hide the first failure
                if failure is None:
                    raise

    def write(
        self,
        step: int,
        metrics: Mapping[str, float],
        ids: Iterable[str],
        skipped: Sequence[str] = (),
    ) -> None:
        """Numbers of a step, its samples' ids and why others were left out; steps count from 1.

        A number that is not finite is null, as JSON has no word for it.
        """
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        left_out = {"skipped": list(skipped)} if skipped else {}
        numbers = {"step": step} | dict.fromkeys(metrics) | finite
        # Whoever watches the run sees every step, and a kill loses none.
        self._logs["metrics.jsonl"].append([numbers])
        self._logs["samples.jsonl"].append([{"step": step, "ids": list(ids), **left_out}])
        self._board.write(step, finite)
        if self._site:
            self._site.write(step, finite)


class _Board:
    """Scalars for TensorBoard.

    tensorboardX's `SummaryWriter` writes in a thread that dies of a full disk and then blocks
    training for ever; its file writer, used here, raises at once.
    """

    def __init__(self, folder: Path, after_step: int):
        event: Any = event_pb2  # protobuf makes the classes at run time
        summary: Any = summary_pb2
        self._event, self._summary = event.Event, summary.Summary
        make_folder(folder)
        # A suffix, as two sessions may begin within the second that the file's name tells.
        self._writer = event_file_writer.EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        start = event.SessionLog(status=event.SessionLog.START)  # drops what an older one went past
        self._write(after_step + 1, session_log=start)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=n, simple_value=v) for n, v in metrics.items()]
        self._write(step, summary=self._summary(value=values))

    def _write(self, step: int, **content: Any) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), step=step, **content))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Site:
    """Scalars for Weights & Biases; a run that goes on goes on there too."""

    def __init__(self, folder: Path, project: str):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ValueError(
                f"log.wandb is {project!r}, but wandb is not installed; "
                "pip install 'mis-jax[wandb]', or leave log.wandb out"
            ) from None
        name = folder / SITE_RUN
        if not name.exists():
            replace_file(name, wandb.util.generate_id() + "\n")
        self._run = wandb.init(
            project=project, id=read_text(name).strip(), resume="allow", dir=str(folder)
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


@dataclass(frozen=True)
class ThroughputMeter:
    """Rates of a run. `peak` is what all its devices can compute a second; None if not known."""

    config: RunConfig
    model: InternVLConfig
    peak: float | None

    @classmethod
    def of(cls, config: RunConfig, model: InternVLConfig, devices: list[Any]) -> "ThroughputMeter":
        chip = flops.chip_of(devices[0].device_kind)
        return cls(config, model, None if chip is None else chip.device_peak * len(devices))

    def rates(
        self, counts: Mapping[str, float], samples: int, positions: int, seconds: float
    ) -> dict[str, float]:
        """What is logged of a step beside its own numbers.

        `counts` has `tokens`, `tiles` and `squares` (of the samples' lengths, summed); `positions`
        is how many tokens its rows could hold. MFU counts the vision tower, causal attention as
        half, and the backward pass of what is trained alone; nothing that is computed again.
        """
        lora = self.config.lora
        work = flops.forward(
            self.model,
            tokens=counts["tokens"],
            tiles=counts["tiles"],
            squares=counts["squares"],
        )
        operations = flops.training(
            work, self.config.train.freeze, lora_on=lora.targets if lora.rank else ()
        )
        rates = {
            "tokens_per_second": counts["tokens"] / seconds,
            "samples_per_second": samples / seconds,
            "useful_tokens": counts["tokens"] / positions,
            "tflops_per_second": operations / seconds / 1e12,
        }
        if self.peak is not None:
            rates["mfu"] = operations / seconds / self.peak
        if memory := jax.local_devices()[0].memory_stats():  # None on a CPU
            rates["memory_gib"] = memory["peak_bytes_in_use"] / flops.GIB
        return rates
