"""Requests from many threads to the one thread that drives the engine.

    any thread --reserve, start, cancel--> engine thread: add, cancel, step --hear--> pieces

A place is taken (`reserve`) when a request is there as a whole and before it is prepared, so that
the number of prompts in memory is bounded; `check_open` refuses before anything is read. A request
holds its place until its last piece, its failure or its cancellation has reached the engine.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

from mis_jax.inference.memory import OutOfMemory
from mis_jax.inference.requests import Request, RequestOutput

Hear = Callable[[RequestOutput | Exception], None]

log = logging.getLogger(__name__)
_JOIN_SECONDS = 10.0  # for the step under way when the service is closed


class Busy(RuntimeError):
    """As many requests run and wait as may."""


class Unavailable(RuntimeError):
    """No request is taken: the service is shutting down, or its engine has failed."""


class EngineFailure(RuntimeError):
    """The engine raised; `__cause__` is what."""


class Engine(Protocol):
    """What the service needs of the engine; all but `check` from one thread alone.

    `step` raises OutOfMemory for a request that has ended so; after anything else that it raises
    the engine cannot be used any more.
    """

    def add(self, request: Request) -> int: ...
    def check(self, request: Request) -> None: ...
    def cancel(self, ticket: int) -> None: ...
    def step(self) -> list[tuple[int, RequestOutput]]: ...

    @property
    def idle(self) -> bool: ...


class Ticket:
    """A place in the service and, once started, the request that holds it."""

    def __init__(self, service: "Service"):
        self._service = service
        self.request: Request | None = None
        self.hear: Hear | None = None
        self.number: int | None = None  # the engine's
        self.over = False  # the place is free again
        self.cancelled = False

    def start(self, request: Request, hear: Hear) -> None:
        """Queue the request; `hear` gets its pieces, or one exception, on the engine's thread.

        `hear` must be quick. A request that can never run is told to it as ValueError.
        """
        self._service._start(self, request, hear)

    def cancel(self) -> None:
        """End the request and free its place; nothing is heard of it after that.

        From any thread and at any time, also when it is over.
        """
        self._service._cancel(self)


class Service:
    """At most `max_concurrent` requests run and `max_queue` wait; the thread starts at once."""

    def __init__(self, engine: Engine, *, max_concurrent: int, max_queue: int):
        if max_concurrent < 1 or max_queue < 0:
            raise ValueError(
                f"max_concurrent is {max_concurrent} and max_queue {max_queue}; give at least 1 "
                "and at least 0"
            )
        self._engine = engine
        self._max_concurrent = max_concurrent
        self._places = max_concurrent + max_queue
        self._changed = threading.Condition()
        # All below is guarded by it.
        self._tickets: set[Ticket] = set()
        self._queue: deque[Ticket] = deque()  # started, not yet the engine's
        self._stale: list[Ticket] = []  # cancelled while the engine had them
        self._held = 0  # so many has the engine
        self._refusal = ""  # why nothing is taken
        self._closing = False
        self._failure: EngineFailure | None = None
        self._when_broken: Callable[[], None] = lambda: None
        self._numbers: dict[int, Ticket] = {}  # of the engine's thread alone
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # From any thread

    @property
    def places(self) -> int:
        """How many may run and wait."""
        return self._places

    def check_open(self) -> None:
        """Raises Busy when there is no place, Unavailable when nothing is taken any more."""
        with self._changed:
            if self._refusal:
                raise Unavailable(self._refusal)
            if len(self._tickets) >= self._places:
                raise Busy(
                    f"{self._places} requests are running or waiting, as many as this server takes"
                )

    def reserve(self) -> Ticket:
        """A place; raises as `check_open` does."""
        with self._changed:
            self.check_open()
            ticket = Ticket(self)
            self._tickets.add(ticket)
            return ticket

    def submit(self, request: Request, hear: Hear) -> Ticket:
        """`reserve` and `start` in one."""
        ticket = self.reserve()
        ticket.start(request, hear)
        return ticket

    def check(self, request: Request) -> None:
        """Raises ValueError for a request that can never run."""
        self._engine.check(request)

    @property
    def running(self) -> int:
        """Requests that are answered now: of those that the engine has, as many as it may run."""
        with self._changed:
            return min(self._held, self._max_concurrent)

    @property
    def waiting(self) -> int:
        """Requests that hold a place and are not answered yet."""
        with self._changed:
            return len(self._tickets) - min(self._held, self._max_concurrent)

    @property
    def full(self) -> bool:
        """Whether every place is taken, so that a request would be refused as one too many."""
        with self._changed:
            return len(self._tickets) >= self._places

    @property
    def refusal(self) -> str:
        """Why no request is taken; empty while they are."""
        with self._changed:
            return self._refusal

    @property
    def failure(self) -> EngineFailure | None:
        """What the engine has failed with."""
        with self._changed:
            return self._failure

    @property
    def broken(self) -> bool:
        """Whether the engine has failed."""
        return self.failure is not None

    def when_broken(self, call: Callable[[], None]) -> None:
        """`call` comes once the engine has failed and all have been told, also if it has already.

        On the engine's thread, or on this one.
        """
        with self._changed:
            self._when_broken = call
        if self.broken:
            call()

    def drain(self, seconds: float) -> bool:
        """Take no more requests and wait for those that are there; whether all have ended."""
        with self._changed:
            self._refusal = self._refusal or "the server is shutting down"
            return self._changed.wait_for(lambda: not self._tickets, seconds)

    def close(self) -> None:
        """End the thread; requests that are not over hear Unavailable."""
        with self._changed:
            self._refusal = self._refusal or "the server is shutting down"
            self._closing = True
            self._changed.notify_all()
        self._thread.join(_JOIN_SECONDS)
        self._end_all(Unavailable("the server is shutting down"))

    def _start(self, ticket: Ticket, request: Request, hear: Hear) -> None:
        with self._changed:
            assert ticket.request is None, "a ticket starts once"
            ticket.request, ticket.hear = request, hear
            if not ticket.over:
                self._queue.append(ticket)
                self._changed.notify_all()
                return
        if not ticket.cancelled:  # the engine failed, or the service closed, in between
            hear(Unavailable(self.refusal))

    def _cancel(self, ticket: Ticket) -> None:
        with self._changed:
            if ticket.over or ticket.cancelled:
                return
            ticket.cancelled = True
            if ticket.request is None or ticket in self._queue:
                if ticket in self._queue:
                    self._queue.remove(ticket)
                self._free(ticket)
            else:
                self._stale.append(ticket)
                self._changed.notify_all()

    def _free(self, ticket: Ticket) -> None:
        ticket.over = True
        self._tickets.discard(ticket)
        self._changed.notify_all()

    # The engine's thread

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:  # whatever it is: nothing is answered from here on
            log.exception("the engine failed; no request is answered any more")
            failure = EngineFailure(f"the engine failed ({type(error).__name__}: {error})")
            failure.__cause__ = error
            with self._changed:
                self._failure = failure
                self._refusal = "the engine has failed; restart the server"
            self._end_all(failure)
            with self._changed:
                call = self._when_broken
            call()

    def _turn(self) -> bool:
        """Some work, once there is any; False when the service is closed."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._queue or self._stale or self._closing or not self._engine.idle
            )
            if self._closing:
                return False
            stale, self._stale = self._stale, []
        self._cancel_in_engine(stale)
        self._admit()
        if not self._engine.idle:
            try:
                pieces = self._engine.step()
            except OutOfMemory as error:
                log.warning("a request was ended: %s", error)
                ticket = self._numbers[error.ticket]
                self._leave([ticket])
                self._tell(ticket, error)
            else:
                self._hand_out(pieces)
        return True

    def _cancel_in_engine(self, stale: list[Ticket]) -> None:
        for ticket in stale:
            if ticket.number in self._numbers:  # else it has ended in the meantime
                self._engine.cancel(ticket.number)
        self._leave(stale)

    def _admit(self) -> None:
        # All of it: the engine itself keeps to its rows, and knows better when somebody waits.
        with self._changed:
            new = list(self._queue)
            self._queue.clear()
            self._held += len(new)
        for ticket in new:
            assert ticket.request is not None
            try:
                ticket.number = self._engine.add(ticket.request)
            except ValueError as error:
                with self._changed:
                    self._held -= 1
                    self._free(ticket)
                self._tell(ticket, error)
            else:
                self._numbers[ticket.number] = ticket

    def _hand_out(self, pieces: list[tuple[int, RequestOutput]]) -> None:
        heard = [(self._numbers[number], piece) for number, piece in pieces]
        # First of all their places: whoever hears the last piece may ask again at once.
        self._leave([ticket for ticket, piece in heard if piece.finish_reason])
        for ticket, piece in heard:
            self._tell(ticket, piece)

    def _leave(self, tickets: list[Ticket]) -> None:
        """These are not the engine's any more."""
        with self._changed:
            for ticket in tickets:
                if ticket.number is not None and self._numbers.pop(ticket.number, None):
                    self._held -= 1
                self._free(ticket)

    def _tell(self, ticket: Ticket, what: RequestOutput | Exception) -> None:
        if ticket.cancelled or ticket.hear is None:
            return
        try:
            ticket.hear(what)
        except Exception as error:  # as of an event loop that has been closed
            log.warning("nobody hears an answer any more (%s)", error)
            ticket.cancel()

    def _end_all(self, error: Exception) -> None:
        with self._changed:
            open_tickets = list(self._tickets)
            self._held = 0
            self._queue.clear()
            for ticket in open_tickets:
                self._free(ticket)
        for ticket in open_tickets:
            self._tell(ticket, error)
