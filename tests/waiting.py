"""Waiting for what another thread or process brings about, however busy the machine is."""

import time
from collections.abc import Callable

#: Seconds after which a test gives up. It is reached only where a test fails, so it is long: on a
#: busy machine of two cores a fresh process has needed more than a minute to import and compile.
DEADLINE = 180.0


def until(holds: Callable[[], bool], *, still: Callable[[], bool] = lambda: True) -> None:
    """Return once `holds()`; fail when `still()` no longer does, or after `DEADLINE`."""
    end = time.monotonic() + DEADLINE
    while not holds():
        assert still(), "it can no longer come about"
        assert time.monotonic() < end, f"it did not come about in {DEADLINE:.0f} s"
        time.sleep(0.005)
