"""Being asked to stop: SIGTERM, SIGINT and SIGHUP end a command with one line and exit code 75.

Where stopping loses nothing, the signal raises `Stop` at once. Where there is something to save it
is only noted (`deferred`). The main thread may be in native code that compiles for minutes, where
Python cannot raise: a thread waits a while and then ends the process, if that loses nothing.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

RESUMABLE = 75  # EX_TEMPFAIL: the same command goes on where this one ended
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_GRACE = 10.0  # seconds; Slurm, Kubernetes and preemptible machines kill after 30
_LOOK = 0.1
_AGAIN = "run the same command again to go on"


class Stop(KeyboardInterrupt):
    """A signal asked the command to stop."""

    def __init__(self, name: str):
        super().__init__(f"stopped by {name}; {_AGAIN}")
        self.signal = signal.Signals[name]


class LostWorker(RuntimeError):
    """A process that read ahead was ended from outside, as the system does when memory is full."""

    exit_code = RESUMABLE


class _State:
    """What has come, and how this process takes it."""

    def __init__(self) -> None:
        self.owner = 0  # process that takes signals here: a fork of it does not
        self.came: str | None = None  # name of the first signal
        self.deferring = False
        self.line: str | None = None  # what is said at the end, if more than the signal's name
        self.writer = -1
        self.over = threading.Event()


_state = _State()


@contextmanager
def stoppable() -> Iterator[None]:
    """Within this block of the main thread a signal raises `Stop`; what was ignored stays so."""
    state = _state
    state.__init__()
    if threading.current_thread() is not threading.main_thread():
        yield  # the caller handles signals
        return
    state.owner = os.getpid()
    with _handled(_raise), _raised_again():
        try:
            yield
        finally:
            state.over.set()
            if state.writer >= 0:
                signal.set_wakeup_fd(-1)
                os.close(state.writer)
            state.__init__()


def watch() -> None:
    """Within `stoppable`, end the process some time after a signal it cannot take.

    To be called once nothing forks any more.
    """
    if not _state.owner or _state.writer >= 0:
        return
    _state.owner = os.getpid()
    reader, _state.writer = os.pipe()
    os.set_blocking(_state.writer, False)
    signal.set_wakeup_fd(_state.writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader, _state.over), name="signals", daemon=True).start()


@contextmanager
def deferred(several: bool = False) -> Iterator[Callable[[], bool]]:
    """Within this block a signal is only noted; what it gives tells whether one has come.

    A second Ctrl-C interrupts all the same. With `several` processes JAX notes SIGTERM on all of
    them, so the other signals become one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # the caller handles signals
        return
    state = _state
    if state.owner != os.getpid():  # not within `stoppable`
        state.__init__()

    def note(number: int, frame: Any) -> None:
        if several:
            os.kill(os.getpid(), signal.SIGTERM)
        elif state.came and number == signal.SIGINT:
            raise Stop(signal.Signals(number).name)
        state.came = state.came or signal.Signals(number).name

    state.deferring = True
    try:
        with _handled(note, SIGNALS[1:] if several else SIGNALS):
            if several and state.came:  # before JAX took SIGTERM over, in code that swallowed it
                os.kill(os.getpid(), signal.SIGTERM)
            yield lambda: state.came is not None
    finally:
        state.deferring = False


def came() -> Stop | None:
    """What has stopped this process, if something has."""
    return None if _state.came is None else Stop(_state.came)


def say(line: str) -> None:
    """What the last line tells if the process has to be ended from here on."""
    _state.line = line


@contextmanager
def _handled(
    handler: Callable[[int, Any], None], signals: tuple[signal.Signals, ...] = SIGNALS
) -> Iterator[None]:
    """Other handlers, where a signal is not ignored, as nohup does with SIGHUP."""
    before = {
        number: signal.signal(number, handler)
        for number in signals
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def _raised_again() -> Iterator[None]:
    """A `Stop` that Python drops, in a callback of its garbage collector, say, comes once more."""
    before = sys.unraisablehook

    def hook(dropped: Any) -> None:
        if not isinstance(dropped.exc_value, Stop):
            before(dropped)
            return
        _state.came = None
        threading.Timer(_LOOK, os.kill, (os.getpid(), dropped.exc_value.signal)).start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _raise(number: int, frame: Any) -> None:
    if os.getpid() != _state.owner:  # a fork: it ends as it would have
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    first, _state.came = _state.came is None, _state.came or signal.Signals(number).name
    if first or number == signal.SIGINT:  # a second SIGTERM does not disturb the way out
        raise Stop(signal.Signals(number).name)


def _watch(reader: int, over: threading.Event) -> None:
    """Wait for signals; `_GRACE` after one, end what stands still and has nothing to lose."""
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        while content := pipe.read(1):
            if content[0] not in SIGNALS:
                continue
            name = signal.Signals(content[0]).name
            left = _GRACE
            while left > 0:  # of the time in which nothing has to be saved
                left = _GRACE if _state.deferring else left - _LOOK
                if over.wait(_LOOK):
                    return
            _end(_state.line or f"stopped by {name}; {_AGAIN}")


def _end(line: str) -> NoReturn:
    with suppress(Exception):
        sys.stdout.flush()
        sys.stderr.write(f"mis-jax: error: {line}\n")
        sys.stderr.flush()
    os._exit(RESUMABLE)
