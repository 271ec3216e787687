"""A run's folder: whose it is, what may be written there, and what a run takes back."""

import hashlib
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mis_jax.checkpoint.train_state import DIGESTS
from mis_jax.config import RunConfig, changed_fields, config_text, load_config
from mis_jax.data.loader import BAD_SAMPLES, MIXTURE, SURVEY
from mis_jax.parallel import processes
from mis_jax.parallel.processes import CHECKPOINTS
from mis_jax.storage.files import read_bytes, remove_empty_folder, replace_file
from mis_jax.storage.folders import remove_new
from mis_jax.storage.locks import LOCK, Lock, key_of_folder, locked_folder
from mis_jax.storage.paths import destination_path, local_path, newest_step
from mis_jax.train.metrics import BOARD_FOLDER, LOG_FILES, SITE_RUN
from mis_jax.train.profile import FOLDER as PROFILE
from mis_jax.train.skipped_batches import FOLDER as KEPT_BATCHES

FINAL_MODEL = "final"  # the trained checkpoint in a run's folder, in native format
CONFIG = "config.yaml"
_WRITTEN = "# Written by mis-jax train; sha256 of what follows: "
_MARK = ".mis-jax-run"  # beside a config.yaml of the user's own, which bears no such line
_MADE = (
    CONFIG, _MARK, MIXTURE, SURVEY, BAD_SAMPLES, *LOG_FILES, CHECKPOINTS, DIGESTS, BOARD_FOLDER,
    KEPT_BATCHES, PROFILE, SITE_RUN, "wandb",
)  # fmt: skip
_LOOK, _PATIENCE = 0.2, 10.0  # seconds in which a network disk shows a new file everywhere
_OF_NOBODY = (LOCK, "lost+found")
# Fields that a run may change when it goes on: they leave the samples and the mathematics alone.
_FREE = (
    "output", "data.on_bad_sample", "data.tile_cache", "data.workers", "train.micro_batch",
    "train.remat", "train.attention", "train.unroll", "train.loss_chunk", "train.save_every",
    "train.save_minutes", "train.check_digests", "train.keep", "train.keep_best",
    "train.on_not_finite", "optimizer.offload", "mesh.", "distributed.", "evaluation.", "log.",
)  # fmt: skip


class RunFolder:
    """The folder of a run, held by this session of it; `run_folder` makes it."""

    def __init__(self, config: RunConfig, lock: Lock | None):
        self.path = Path(config.output)
        self._config = config
        self._lock = lock  # of the first process alone
        self._before = _names(self.path)
        self.keeps = False  # what is written: a step was taken, now or earlier

    def begin(self) -> None:
        """Write the settings, unless the user's own file, which says the same, stands there."""
        path = self.path / CONFIG
        if not path.exists() or _is_ours(path):
            text = config_text(self._config)
            replace_file(path, f"{_WRITTEN}{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
        else:
            replace_file(self.path / _MARK, f"A run writes here; {CONFIG} is not its own.\n")

    def check(self) -> None:
        """Raise OSError if the folder was moved or removed, or another process took it."""
        if self._lock:
            self._lock.check()

    def check_shared(self) -> None:
        """Raise ValueError where the folder of this process is not the one that the first holds.

        Saving would wait for ever.
        """
        if not processes.several():
            return
        lock = self._lock
        said = processes.word_of_first(
            "folder", lambda: f"{lock.key if lock else ''} {socket.gethostname()}"
        )
        key, host = said.split(" ", 1)
        end = time.monotonic() + _PATIENCE
        while key_of_folder(self.path) != key:
            if time.monotonic() > end:
                raise ValueError(
                    f"output {self.path.absolute()}: on {socket.gethostname()} this is not the "
                    f"folder that process 0 writes on {host}; give an absolute path on a disk that "
                    "all hosts share"
                )
            time.sleep(_LOOK)

    def lost(self) -> str | None:
        """What `check` would say."""
        try:
            self.check()
        except OSError as error:
            return str(error)
        return None

    def take_back(self) -> None:
        """Remove what this session has made, unless a step was taken, and nothing else."""
        if self._lock and not self.keeps:
            with suppress(OSError):
                remove_new(self.path, _MADE, self._before)

    def check_final(self, steps: int) -> None:
        """A finished model must be of the checkpoints beside it."""
        final = self.path / FINAL_MODEL
        if final.exists() and newest_step(self.path / CHECKPOINTS) != steps:
            raise ValueError(
                f"{final}: a finished model, but {self.path / CHECKPOINTS} has no checkpoint of "
                f"step {steps}, the last of this run, so it is not known to be of this run; move "
                "it away or choose another output"
            )


@contextmanager
def run_folder(config: RunConfig) -> Iterator[RunFolder]:
    """Hold the folder of a run; ValueError where it is another's, or of another run."""
    _check_paths(asdict(config), "")
    output = destination_path(config.output, "output")
    if not processes.is_first():  # the first process holds it for all of them
        _check(config, output)
        yield RunFolder(config, None)
        return
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output}: is a file; choose another output")
    _check(config, output)  # before even a lock is written there
    new = not output.exists()
    with locked_folder(output) as lock:
        _check(config, output)
        folder = RunFolder(config, lock)

        def leave() -> None:
            folder.take_back()
            lock.release()
            if new:
                remove_empty_folder(output)

        processes.before_leaving(leave)
        yield folder


def _check_paths(values: Any, name: str) -> None:
    """Every path of a configuration is one of this machine's file system."""
    if isinstance(values, Path):
        local_path(values, name)
    elif isinstance(values, dict):
        for key, value in values.items():
            _check_paths(value, f"{name}.{key}" if name else key)
    elif isinstance(values, tuple):
        for value in values:
            _check_paths(value, name)


def _check(config: RunConfig, output: Path) -> None:
    saved = output / CONFIG
    resumes = newest_step(output / CHECKPOINTS) is not None
    if not saved.exists():
        if resumes:
            raise ValueError(
                f"{saved}: missing beside checkpoints, so their settings are not known; restore it "
                "or choose another output"
            )
        if names := _names(output):
            raise ValueError(
                f"output {output}: is not empty ({', '.join(sorted(names)[:3])}) and not the "
                f"folder of a run, which has a {CONFIG}; choose another output"
            )
        return
    if not resumes and _is_ours(saved):
        return
    changed = changed_fields(load_config(saved), config)
    if resumes:
        changed = [name for name in changed if not name.startswith(_FREE)]
    if changed and resumes:
        raise ValueError(
            f"{saved}: this folder holds a run with other settings ({', '.join(changed)}); "
            "choose another output, or remove the folder"
        )
    unknown = sorted(set(_MADE) & _names(output) - {CONFIG})
    if unknown and not resumes and not (output / _MARK).exists():
        raise ValueError(
            f"output {output}: holds {', '.join(unknown)}, which no run of mis-jax wrote; choose "
            "another output, or move them away"
        )
    if changed:
        raise ValueError(
            f"{saved}: was not written by a run and says otherwise ({', '.join(changed)}); move it "
            "away or choose another output"
        )


def _is_ours(path: Path) -> bool:
    """Whether a run wrote this file and nobody has changed it since."""
    first, _, rest = read_bytes(path).partition(b"\n")
    return first.decode(errors="replace") == _WRITTEN + hashlib.sha256(rest).hexdigest()


def _names(output: Path) -> set[str]:
    """What stands in a folder, without what anyone or a kill leaves there."""
    if not output.is_dir():
        return set()
    return {
        path.name
        for path in output.iterdir()
        if path.name not in _OF_NOBODY and not path.name.startswith(f".{CONFIG}.")
    }
