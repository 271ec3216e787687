"""A profile of a few steps, for TensorBoard or xprof."""

from pathlib import Path

import jax

from mis_jax.config import LogConfig

FOLDER = "profile"


class ProfileWindow:
    """Traces steps `profile_start` to `profile_start + profile_steps - 1` into a run's folder."""

    def __init__(self, config: LogConfig, output: Path):
        self._first = config.profile_start
        self._last = config.profile_start + config.profile_steps - 1 if self._first else 0
        self._folder = output / FOLDER
        self._open = False

    def before(self, step: int) -> None:
        """Called before a step is handed to the devices; steps count from 1."""
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._open = True

    def after(self, step: int, outcome: object) -> None:
        """Called with what a step gives, which the window's last step waits for."""
        if self._open and step >= self._last:
            jax.block_until_ready(outcome)
            self.close()

    def close(self) -> None:
        """End a trace that the end of a run cut short."""
        if self._open:
            jax.profiler.stop_trace()
            self._open = False
