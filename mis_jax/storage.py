"""The one module that touches orbax: trees of arrays on disk, and the checkpoints of a run."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grain
import grain.checkpoint
import jax
import orbax.checkpoint as ocp


@contextmanager
def finished_folder(destination: Path) -> Iterator[Path]:
    """A temporary sibling folder that becomes `destination` when the block ends without an error.

    Nothing half-written is ever seen under the final name. An existing destination is refused.
    """
    destination = Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination}: exists already; remove it or choose another folder")
    destination.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    work.chmod(0o755)
    try:
        yield work
        if destination.is_dir():
            destination.rmdir()
        os.replace(work, destination)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def save_tree(folder: Path, tree: Any) -> None:
    """Write a nested dict of arrays. Raises OSError when the disk does not take it."""
    with _disk_errors(folder), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder).absolute(), tree)


def restore_tree(folder: Path, abstract: Any) -> Any:
    """Read a nested dict of arrays into the shapes, dtypes and shardings of `abstract`."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(Path(folder).absolute(), abstract)


def stored_arrays(folder: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of the arrays of a tree on disk by dotted path."""
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(Path(folder).absolute()).item_metadata.tree
    leaves, _ = jax.tree_util.tree_flatten_with_path(metadata)
    return {
        ".".join(k.key for k in path): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in leaves
    }


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Tensorstore tells of a full disk by a ValueError; make an OSError of it."""
    try:
        yield
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise OSError(f"{path}: cannot be written ({reason})") from error


class RunCheckpoints:
    """Checkpoints of a training run: state, data iterator and timer, saved together."""

    def __init__(self, folder: Path, keep: int):
        self._folder = Path(folder).absolute()
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=True,
                cleanup_tmp_directories=True,  # of a save that a kill cut short
                enable_async_checkpointing=False,
            ),
        )

    @staticmethod
    def exist(folder: Path) -> bool:
        """Whether a folder holds any complete checkpoint."""
        return Path(folder).is_dir() and any(p.name.isdigit() for p in Path(folder).iterdir())

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data: Any, meta: dict[str, Any]) -> None:
        """Write one checkpoint; it counts only once it is complete.

        Raises OSError when the disk does not take it.
        """
        with _disk_errors(self._folder / str(step)):
            written = self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=grain.checkpoint.CheckpointSave(data),
                    meta=ocp.args.JsonSave(meta),
                ),
            )
            self._manager.wait_until_finished()
        assert written, f"orbax did not save step {step}"

    def restore(self, step: int, state: Any, data: Any) -> tuple[Any, dict[str, Any]]:
        """State in the shapes and shardings of the (abstract) `state`; sets the iterator `data`.

        Raises ValueError naming the folder when it cannot be read.
        """
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(state),
                    data=grain.checkpoint.CheckpointRestore(data),
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

    def close(self) -> None:
        self._manager.close()


def replace_file(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new, never a part."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
