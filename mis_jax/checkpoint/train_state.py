"""The one module that touches orbax: the checkpoints of a training run."""

import json
import logging
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint import checkpoint_managers as policies

from mis_jax.parsing import parse_json
from mis_jax.storage.files import make_folder, move_aside, read_bytes, remove_file, replace_file
from mis_jax.storage.hashing import changed_files, file_digest
from mis_jax.storage.paths import complete_steps, files_below, is_step, newest_step

_log = logging.getLogger(__name__)
DIGESTS = "digests"  # beside the folder of the checkpoints: one file a step


class RunCheckpoints:
    """Checkpoints of a training run: state, place in the data and timer, saved together.

    Saving goes on in the background; the state is copied before `save` returns. The `keep` newest
    are kept, and with `keep_best` the one of the lowest attack success rate.
    """

    def __init__(self, folder: Path, keep: int, *, keep_best: bool = False):
        self._folder = Path(folder).resolve()
        kept: list[policies.PreservationPolicy] = [policies.LatestN(keep)]
        if keep_best:
            best = policies.BestN(
                get_metric_fn=lambda metrics: metrics["asr"],
                reverse=True,
                n=1,
                keep_checkpoints_without_metrics=False,
            )
            kept.append(best)
        self._digests = _Digests(self._folder) if jax.process_index() == 0 else None
        self._saving: int | None = None
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(kept),
                best_fn=(lambda metrics: metrics["asr"]) if keep_best else None,
                create=True,
                cleanup_tmp_directories=True,  # of a save that a kill cut short
                single_host_load_and_broadcast=jax.process_count() > 1,
            ),
        )

    @staticmethod
    def exist(folder: Path) -> bool:
        """Whether a folder holds any complete checkpoint."""
        return newest_step(Path(folder)) is not None

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return newest_step(self._folder)

    def save(self, step: int, state: Any, meta: dict[str, Any], asr: float | None = None) -> None:
        """Begin to write one checkpoint; it counts only once it is complete.

        `asr` is the attack success rate of this state. Raises OSError when the disk did not take
        this checkpoint, or the one before.
        """
        self.wait()
        with self._disk_errors():
            self._saving = step
            written = self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    meta=ocp.args.JsonSave(meta),
                ),
                metrics=None if asr is None else {"asr": asr},
                force=True,
            )
        assert written, f"orbax did not save step {step}"

    def check(self) -> None:
        """Raise OSError if the checkpoint in the making could not be written."""
        with self._disk_errors():
            self._manager.check_for_errors()
        self._ask_for_digests()

    def wait(self) -> None:
        """Return once every checkpoint is complete; raises OSError as `save`."""
        with self._disk_errors():
            self._manager.wait_until_finished()
        self._ask_for_digests()

    def restore(self, step: int, state: Any) -> tuple[Any, dict[str, Any]]:
        """State in the shapes and shardings of the (abstract) `state`, and what was saved with it.

        Raises ValueError naming the folder when it cannot be read.
        """
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(state),
                    meta=ocp.args.JsonRestore(),
                ),
            )
        except Exception as error:  # whatever orbax meets in a folder that is not whole
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"{self._folder / str(step)}: not readable ({reason}); remove this folder to go on "
                "from the checkpoint before it"
            ) from error
        return restored["state"], restored["meta"]

    def finish(self) -> None:
        """Return once every checkpoint is complete and has its digests; raises OSError."""
        self.wait()
        if self._digests:
            self._digests.wait()

    def close(self) -> None:
        """Let go of everything; what `wait` would raise has been told, or something else has."""
        if self._digests:
            self._digests.close()
        with suppress(Exception):
            self._manager.close()

    def _ask_for_digests(self) -> None:
        if self._digests and self._saving is not None and self._saving == self.latest:
            self._digests.ask(self._saving)
            self._saving = None

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Tensorstore tells of a full disk by a ValueError; make an OSError of it."""
        try:
            yield
        except (ValueError, OSError) as error:
            reason = " ".join(str(error).split())
            path = self._folder if self._saving is None else self._folder / str(self._saving)
            raise OSError(f"{path}: cannot be written ({reason})") from error


class _Digests:
    """A thread that writes the sha256 of every file of a complete checkpoint, beside it.

    Hashing reads what was just written, at a gigabyte or two a second on one core: too long to
    wait for between steps. A run that is stopped gives it up.
    """

    def __init__(self, checkpoints: Path):
        self._checkpoints = checkpoints
        self._folder = checkpoints.parent / DIGESTS
        self._asked: queue.Queue[int | None] = queue.Queue()
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._work, name="digests", daemon=True)
        self._thread.start()

    def ask(self, step: int) -> None:
        self._asked.put(step)

    def wait(self) -> None:
        self._asked.put(None)
        self._thread.join()

    def close(self) -> None:
        self._given_up.set()
        self.wait()

    def _work(self) -> None:
        while (step := self._asked.get()) is not None:
            with suppress(OSError, InterruptedError):  # too old and removed, or the disk is full
                self._write(step)

    def _write(self, step: int) -> None:
        folder = self._checkpoints / str(step)
        # One at a time: the steps need the cores.
        files = {name: file_digest(folder / name, self._given_up) for name in files_below(folder)}
        make_folder(self._folder)
        replace_file(self._folder / f"{step}.json", json.dumps(files, indent=0) + "\n")
        for path in self._folder.glob("*.json"):
            if not (self._checkpoints / path.stem).is_dir():
                remove_file(path)


def is_run_checkpoint(folder: Path) -> bool:
    """Whether a folder is one checkpoint of a run, such as `OUT/checkpoints/200`."""
    return is_step(folder.resolve().name) and (folder / "_CHECKPOINT_METADATA").is_file()


def open_trained(folder: Path) -> dict[str, Any]:
    """Tensorstore's arrays of the parameters that one checkpoint of a run holds; no value is read.

    By dotted path, as they were trained. ValueError where the checkpoint is damaged.
    """
    state = folder.resolve() / "state"
    try:
        entries = parse_json(read_bytes(state / "_METADATA"))["tree_metadata"].values()
        keys = [[part["key"] for part in entry["key_metadata"]] for entry in entries]
        opening = {
            key[1]: tensorstore.open(
                {
                    "driver": "zarr",
                    "kvstore": {
                        "driver": "ocdbt",
                        "base": {"driver": "file", "path": f"{state}/"},
                        "path": f"{'.'.join(key)}/",
                    },
                },
                read=True,
            )
            for key in keys
            if key[0] == "trainable"
        }
        return {name: future.result() for name, future in opening.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unreadable(folder, error) from error


def unreadable(folder: Path, error: Exception) -> ValueError:
    """What is said of a checkpoint of a run whose values cannot be read."""
    reason = " ".join((str(error) or type(error).__name__).split())[:200]
    return ValueError(f"{folder}: not readable ({reason}); take another checkpoint of the run")


def set_aside_damaged(checkpoints: Path) -> None:
    """Move a newest checkpoint that is not what was saved out of the way, with a warning.

    It is `damaged-checkpoint-STEP` beside the folder then, and a run goes on from the one before.
    A checkpoint without digests, of a run that was killed, passes. Every file of one is read.
    Raises ValueError when none is whole.
    """
    damaged: dict[int, str] = {}
    for step in complete_steps(checkpoints)[::-1]:
        if not (checkpoints.parent / DIGESTS / f"{step}.json").exists():
            break
        problems = inspect_run_checkpoint(checkpoints / str(step))["problems"]
        if not problems:
            break
        damaged[step] = problems[0]
    else:
        if damaged:
            raise ValueError(
                f"{damaged[max(damaged)]}, and no other checkpoint is whole; restore one from a "
                "copy, or choose another output"
            )
    for step, problem in damaged.items():
        away = checkpoints.parent / f"damaged-checkpoint-{step}"
        while away.exists():
            away = away.with_name(f"{away.name}-again")
        move_aside(checkpoints / str(step), away)
        _log.warning("%s; moved to %s, going on from the one before", problem, away)


def inspect_run_checkpoint(folder: Path, *, check_digests: bool = True) -> dict[str, Any]:
    """What one checkpoint of a run holds; `problems` names every file that is not as it was saved.

    With `check_digests` every file is read and compared with its digest of when it was saved.
    """
    files, saved = files_below(folder), saved_digests(folder)
    found: dict[str, Any] = {
        "format": "checkpoint of a run",
        "step": int(folder.resolve().name),
        "files": len(files),
        "bytes": sum((folder / name).stat().st_size for name in files),
        "digests": "none" if saved is None else str(_digests_path(folder)),
        "problems": [],
    }
    if saved is None:
        found["problems"] = [f"{_digests_path(folder)}: missing, so nothing can be compared"]
    elif check_digests:
        strays = [f"{folder / n}: was not there when it was saved" for n in files if n not in saved]
        found["problems"] = changed_files(folder, saved) + strays
    return found


def saved_digests(folder: Path) -> dict[str, str] | None:
    """Digests of the files of one checkpoint of a run; None of one whose run was killed then."""
    path = _digests_path(folder)
    if not path.exists():
        return None
    try:
        return dict(parse_json(read_bytes(path)))
    except (ValueError, TypeError):
        raise ValueError(f"{path}: not readable; restore it from a copy or remove it") from None


def _digests_path(folder: Path) -> Path:
    folder = folder.resolve()
    return folder.parent.parent / DIGESTS / f"{folder.name}.json"
