"""One writer of a run's numbers: metrics.jsonl, samples.jsonl, TensorBoard, Weights & Biases."""

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from tensorboardX import event_file_writer
from tensorboardX.proto import event_pb2, summary_pb2

from mis_jax.parsing import parse_json
from mis_jax.storage.folders import replace_file

LOG_FILES = ("metrics.jsonl", "samples.jsonl")
BOARD_FOLDER = "tensorboard"
SITE_RUN = "wandb_run"  # holds the name of the run there


class MetricsLog:
    """Appends a line a step; entries after the step that a run resumes at are dropped first.

    Raises OSError when the disk does not take a line.
    """

    def __init__(self, folder: Path, *, after_step: int, project: str | None = None):
        self._site = None if project is None else _Site(folder, project)
        self._files: dict[str, IO[str]] = {}
        for name in LOG_FILES:
            path = folder / name
            _keep_until(path, after_step)
            self._files[name] = path.open("a", encoding="utf-8")
        self._board = _Board(folder / BOARD_FOLDER, after_step)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if self._site:
            self._site.close(failed=failure is not None)
        for file in (*self._files.values(), self._board):
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
        self._line("metrics.jsonl", {"step": step} | dict.fromkeys(metrics) | finite)
        left_out = {"skipped": list(skipped)} if skipped else {}
        self._line("samples.jsonl", {"step": step, "ids": list(ids), **left_out})
        self._board.write(step, finite)
        if self._site:
            self._site.write(step, finite)

    def _line(self, name: str, content: Mapping[str, Any]) -> None:
        file = self._files[name]
        file.write(json.dumps(content) + "\n")
        file.flush()  # whoever watches the run sees every step, and a kill loses none


class _Board:
    """Scalars for TensorBoard.

    tensorboardX's `SummaryWriter` writes in a thread that dies of a full disk and then blocks
    training for ever; its file writer, used here, raises at once.
    """

    def __init__(self, folder: Path, after_step: int):
        event: Any = event_pb2  # protobuf makes the classes at run time
        summary: Any = summary_pb2
        self._event, self._summary = event.Event, summary.Summary
        folder.mkdir(exist_ok=True)
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
            project=project, id=name.read_text().strip(), resume="allow", dir=str(folder)
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _keep_until(path: Path, step: int) -> None:
    """Drop lines of later steps, and a line that was torn by a kill."""
    if not path.exists():
        return
    kept = []
    # Only "\n" ends a line: str.splitlines() would also cut at U+2028, which an id may hold.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            if parse_json(line, finite=False)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    replace_file(path, "".join(kept))
