"""A parent that waits for the process of a run and has the last word.

JAX ends a process from native code when it loses another one, with a stack trace and no Python of
ours. So the process that the user started forks before JAX starts: the child trains, the parent
waits, passes signals on, and tells an end that the child could not tell in one line.
"""

import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Callable

# Of JAX's coordination: what it says once a process is lost is told in one line instead.
_RECORD = re.compile(r"[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ (\S+?):\d+\] ")
_COORDINATION = ("client.h", "coordination_", "preemption_", "distributed_")
#: Line and exit code for a child that a signal ended, from what its native code wrote last.
Explain = Callable[[str, int], tuple[str, int]]


def supervise(explain: Explain) -> None:
    """Fork, and go on in the child; the parent never returns and ends with the child's code.

    To be called before any thread is started. The child ends when the parent is gone.
    """
    held_by_parent, watched_by_child = os.pipe()[::-1]
    native, native_writes = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        os.close(watched_by_child)
        os.close(native_writes)
        _wait(child, native, explain)
    os.close(held_by_parent)
    os.close(native)
    # What Python writes goes on to the terminal as before; what native code writes is looked at.
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="replace")
    os.dup2(native_writes, 2)
    os.close(native_writes)
    threading.Thread(target=_end_with_parent, args=(watched_by_child,), daemon=True).start()


def _end_with_parent(pipe: int) -> None:
    os.read(pipe, 1)  # returns when the parent is gone
    os.kill(os.getpid(), signal.SIGKILL)


def _wait(child: int, native: int, explain: Explain) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the child too
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup does
            signal.signal(number, lambda number, frame: os.kill(child, number))
    text = _NativeText()
    reader = threading.Thread(target=text.read, args=(native,), daemon=True)
    reader.start()
    _, status = os.waitpid(child, 0)
    reader.join(timeout=2)  # processes that the child started may hold the pipe open
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        line, code = explain(text.held, -code)
        sys.stderr.write(f"mis-jax: error: {line}\n")
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(code)


class _NativeText:
    """Passes on what native code writes, and holds back what coordination says of a loss."""

    def __init__(self) -> None:
        self.held = ""

    def read(self, pipe: int) -> None:
        holding = False
        with os.fdopen(pipe, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if record := _RECORD.match(line):
                    holding = record[1].startswith(_COORDINATION)
                if holding:
                    self.held = (self.held + line)[-20_000:]
                else:
                    sys.stderr.write(line)
                    sys.stderr.flush()
