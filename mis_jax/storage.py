"""The one module that touches orbax: the checkpoints of a training run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Tensorstore tells of a full disk by a ValueError; make an OSError of it."""
    try:
        yield
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise OSError(f"{path}: cannot be written ({reason})") from error


class RunCheckpoints:
    """Checkpoints of a training run: state, place in the data and timer, saved together."""

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

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Write one checkpoint; it counts only once it is complete.

        Raises OSError when the disk does not take it.
        """
        with _disk_errors(self._folder / str(step)):
            written = self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    meta=ocp.args.JsonSave(meta),
                ),
            )
            self._manager.wait_until_finished()
        assert written, f"orbax did not save step {step}"

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

    def close(self) -> None:
        self._manager.close()
