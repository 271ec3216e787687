"""Memory of large requests goes back to the system: glibc keeps what its threads have freed.

Without it a server held 2 to 4 GB after a minute of bodies of 16 MB, all of them refused.
"""

import ctypes
import threading

LARGE = 1 << 20  # bytes of a body from which on it is worth it
_AFTER = 1.0  # seconds


class Trimmer:
    """Gives free memory back soon after it is asked to; does nothing without glibc."""

    def __init__(self) -> None:
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._waiting = threading.Lock()

    def ask(self) -> None:
        """In a second; requests that end meanwhile are covered by that."""
        if self._trim is not None and self._waiting.acquire(blocking=False):
            timer = threading.Timer(_AFTER, self._give_back)
            timer.daemon = True
            timer.start()

    def _give_back(self) -> None:
        self._waiting.release()  # first: what is freed from here on asks again
        assert self._trim is not None
        self._trim(0)
